"Models as mteb measures them: on a small local task of the form of FashionIQIT2IRetrieval, their figures beside ours."
import pytest
import torch

from dqe_cir.data import load_dataset
from dqe_cir.encoder import cache_tokens
from dqe_cir.evaluator.scoring import evaluate
from dqe_cir.retriever import Retriever
from dqe_cir.retriever.benchmarks import MtebModel

mteb = pytest.importorskip("mteb", reason="pip install dqe-cir[mteb]")
datasets = pytest.importorskip("datasets", reason="pip install dqe-cir[mteb]")


@pytest.fixture(scope="module")
def dresses(home):
    "The garments' validation queries of one category, one right answer each, as one gallery."
    import dataclasses
    data = load_dataset("garments", split="val", size="smoke")
    triplets = [dataclasses.replace(t, positives=frozenset({t.target})) for t in data.triplets if t.category == "dress"]
    return dataclasses.replace(data, triplets=triplets, galleries={"dress": data.galleries["dress"]})


def task_of(data):
    "The same in the form of M-BEIR: queries of image and text, a corpus of images, and which are right."
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.tasks.retrieval.eng.fashion_iq_it2i_retrieval import FashionIQIT2IRetrieval
    from PIL import Image

    def pictures(names): return [Image.open(data.files[name]).convert("RGB") for name in names]

    def table(ids, names, **more):
        features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image(), **{name: datasets.Value("string") for name in more}})
        cells = features.encode_batch({"id": ids, "image": pictures(names), **more})
        rows = datasets.table.InMemoryTable.from_pydict(cells, schema=features.arrow_schema)
        return datasets.Dataset(rows, info=datasets.DatasetInfo(features=features), fingerprint=f"{len(ids)}-{len(more)}")

    class GarmentsIT2IRetrieval(AbsTaskRetrieval):
        metadata = TaskMetadata(**FashionIQIT2IRetrieval.metadata.model_dump() | {"name": "GarmentsIT2IRetrieval", "dataset": {"path": "local", "revision": "1"}})

        def load_data(self, *args, **options):
            gallery, asked = data.galleries["dress"], [f"q{i}" for i in range(len(data.triplets))]
            texts = [" and ".join(t.captions) for t in data.triplets]
            self.dataset = {"default": {"test": {
                "corpus": table(gallery, gallery), "queries": table(asked, [t.reference for t in data.triplets], text=texts),
                "relevant_docs": {name: {t.target: 1} for name, t in zip(asked, data.triplets)}, "top_ranked": None}}}
            self.data_loaded = True

    return GarmentsIT2IRetrieval()


@pytest.mark.parametrize("load", [lambda: Retriever.load("garments", "cpu"), lambda: Retriever.zero_shot("mini", device="cpu")], ids=["trained", "zero-shot"])
def test_their_recall_is_ours(dresses, load):
    "Queries with one right answer, the reference left in the corpus: recall at k is one figure on both sides."
    retriever = load()
    theirs = mteb.evaluate(MtebModel(retriever), task_of(dresses), cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs={"batch_size": 16})
    [found] = theirs.task_results[0].scores["test"]
    ours = evaluate(retriever.method, dresses, cache_tokens(retriever.method.encoder, dresses, progress=False))
    for k in (1, 5, 10): assert 100 * found[f"recall_at_{k}"] == pytest.approx(ours.metrics[f"R@{k}"], abs=0.01), k
    reciprocal = (10 >= ours.measures["rank"]).float() / torch.log2(ours.measures["rank"].float() + 1)
    assert found["ndcg_at_10"] == pytest.approx(reciprocal.mean().item(), abs=1e-3)


def test_the_two_standard_tasks_are_of_this_form():
    for name in ("FashionIQIT2IRetrieval", "CIRRIT2IRetrieval"):
        about = mteb.get_task(name).metadata
        assert about.category == "it2i" and set(about.modalities) == {"image", "text"}


def test_a_record_names_the_model():
    meta = MtebModel(Retriever.zero_shot("mini", device="cpu"), "somebody/mini").mteb_model_meta
    assert meta.name == "somebody/mini" and len(meta.revision) == 16
