"A drawn world of scenes: their pictures, requests, benchmark and reader."
