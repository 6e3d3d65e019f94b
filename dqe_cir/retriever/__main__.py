"`python -m dqe_cir.retriever index | search | serve | export`"
import sys

from dqe_cir.retriever.commands import main

sys.exit(main())
