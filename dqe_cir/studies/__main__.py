"`python -m dqe_cir.studies bench` and `bench-gpu`"
import sys

from dqe_cir.studies.bench_gpu import main

sys.exit(main())
