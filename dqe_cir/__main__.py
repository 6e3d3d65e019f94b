"`python -m dqe_cir NOTEBOOK OUTPUT`: papermill, in words."
import sys

from dqe_cir.terminal import main

sys.exit(main())
