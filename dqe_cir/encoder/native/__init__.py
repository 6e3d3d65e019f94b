"The backbones the compared systems were published with."
