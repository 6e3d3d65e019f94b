"`python -m dqe_cir.retriever export`"
import sys

from dqe_cir.retriever.share import main

sys.exit(main())
