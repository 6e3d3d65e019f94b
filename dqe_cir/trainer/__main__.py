"`python -m dqe_cir.trainer`"
import sys

from dqe_cir.trainer.launching import main

sys.exit(main())
