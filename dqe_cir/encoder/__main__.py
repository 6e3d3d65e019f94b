"`python -m dqe_cir.encoder convert`"
import sys

from dqe_cir.encoder.checkpoints import main

sys.exit(main())
