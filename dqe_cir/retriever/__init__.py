"A trained method and the pictures it searches."
from dqe_cir.retriever.index import IndexReport, Retriever, SHIPPED
from dqe_cir.retriever.search import Result
from dqe_cir.retriever.explain import Explanation
from dqe_cir.retriever.share import export
from dqe_cir.retriever.session import SearchConfig, Session
from dqe_cir.retriever.page import SearchPage
from dqe_cir.retriever.beyond_memory import QdrantFolder, QdrantServer
from dqe_cir._moved import old_name


def __getattr__(name): return old_name("retriever", name)
