"Pictures, captions and data sets: everything that is read from disk before a model sees it."
from dqe_cir.data.pictures import CLIP_MEAN, CLIP_STD, as_rgb, open_image, square_pad, target_pad
from dqe_cir.data.captions import caption_text, clean_caption, join_captions
from dqe_cir.data.base import CIRDataset, DatasetSpec, DrawnWorld, Triplet, uneven_targets
from dqe_cir.data.fashioniq import load_fashioniq
from dqe_cir.data.cirr import load_cirr
from dqe_cir.data.circo import load_circo
from dqe_cir.data.hp_fashioniq import load_hp_fashioniq
from dqe_cir.data.custom import load_custom
from dqe_cir.data.garments.reader import load_garments
from dqe_cir.data.garments.benchmark import make_garments
from dqe_cir.data.datasets import SPECS, load_dataset, sample_banner
from dqe_cir.data.verify import verify_images
from dqe_cir._moved import old_name


def __getattr__(name): return old_name("data", name)
