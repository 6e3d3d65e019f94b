"`python -m dqe_cir.data verify`"
import sys

from dqe_cir.data.verify import main

sys.exit(main())
