"`python -m dqe_cir.encoder convert|verify|tokens`"
import sys

from dqe_cir.encoder import checkpoints, tokens

sys.exit(tokens.main(sys.argv[2:]) if sys.argv[1:2] == ["tokens"] else checkpoints.main())
