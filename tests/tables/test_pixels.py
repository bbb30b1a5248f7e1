"""The picture that a policy gets: what its processor would make of the whole one, in less memory."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    AutoImageProcessor,
    Gemma3ImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3ImageProcessor,
    LlavaOnevisionImageProcessor,
    Qwen2VLImageProcessor,
    SmolVLMImageProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from tasks.engines.base import Completion, PromptBuilder, Request, Sampling
from tasks.engines.worker import Query, Shard, Worker
from tasks.tables import schemas, shards
from tasks.tables.pixels import Decoder
from tests.conftest import ENGINE
from tests.ingest.test_pictures import encoded, opened, photograph

QWEN = {"shortest_edge": 56**2, "longest_edge": 224**2}


def decoder(image_processor) -> Decoder:
    return Decoder(SimpleNamespace(image_processor=image_processor))


def grainy(size=(1500, 1000), mode="RGB") -> Image.Image:
    """Patches of colour with grain: more detail than a photograph keeps."""
    rng = np.random.default_rng(0)
    soft = np.asarray(photograph(1, size), dtype=float)
    grain = rng.normal(size=(size[1], size[0], 1)) * 8
    return Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)).convert(mode)


def grid(processor, width: int, height: int) -> tuple[int, int]:
    bounds = {"min_pixels": processor.size.shortest_edge, "max_pixels": processor.size.longest_edge}
    return smart_resize(height, width, 28, **bounds)


@given(
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.sampled_from([(3136, 401_408), (3136, 12_845_056), (7056, 7056), (784, 28**2 * 3)]),
)
def test_the_patches_are_those_of_the_whole_picture(width, height, bounds):
    processor = Qwen2VLImageProcessor(size=dict(zip(("shortest_edge", "longest_edge"), bounds, strict=True)))  # fmt: skip
    got = decoder(processor).size(width, height)
    if width * height <= bounds[1]:
        assert got == (width, height), "at or below the limit it stays as it is"
    if max(width, height) / min(width, height) > 200:
        assert got == (width, height), "what the processor refuses is left for it to refuse"
    else:
        assert grid(processor, *got) == grid(processor, width, height)


@pytest.mark.parametrize(
    "size", [(4000, 3000), (3000, 4000), (4001, 2999), (9000, 120), (120, 9000), (637, 641)]
)
def test_a_large_picture_comes_in_its_final_size(size):
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 401_408})
    assert decoder(processor).size(*size) == grid(processor, *size)[::-1] != size


def test_bounds_that_are_one_leave_a_part_of_the_picture():
    processor = Qwen2VLImageProcessor(size={"shortest_edge": 84**2, "longest_edge": 84**2})
    assert decoder(processor).size(4000, 3000) == (174, 131)
    assert decoder(processor)(encoded(grainy())).size == (188, 125)


FAMILIES = [
    (Qwen2VLImageProcessor(size=dict(QWEN)), (252, 168)),
    (Qwen2VLImageProcessorPil(size=dict(QWEN)), (252, 168)),
    (Gemma3ImageProcessor(), (224, 224)),
    (Idefics3ImageProcessor(size={"longest_edge": 728}), (728, 486)),
    (SmolVLMImageProcessor(size={"longest_edge": 364}), (364, 242)),
    (SmolVLMImageProcessor(size={"longest_edge": 728}, do_image_splitting=False), (728, 486)),
]


@pytest.mark.parametrize(("processor", "size"), FAMILIES)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_processor_makes_of_it_what_it_makes_of_the_whole_picture(processor, size, form):
    data = encoded(grainy(), form, **({"quality": 90} if form == "JPEG" else {}))
    picture = decoder(processor)(data)
    assert (picture.size, picture.mode) == (size, "RGB")
    whole, ours = (processor([[p]], return_tensors="pt") for p in (opened(data), picture))
    assert whole.keys() == ours.keys()
    for name, values in whole.items():
        if name != "pixel_values":
            assert np.array_equal(values, ours[name]), name
    levels = np.abs(np.asarray(whole["pixel_values"]) - np.asarray(ours["pixel_values"]))
    levels *= 255 * np.mean(processor.image_std)  # as the 8 bits of a colour count
    mean, most = (0.6, 3) if form == "JPEG" else (0.01, 0)
    assert levels.mean() < mean
    assert np.quantile(levels, 0.99) <= most


@pytest.mark.parametrize(
    "processor",
    [
        GotOcr2ImageProcessor(crop_to_patches=True),
        LlavaOnevisionImageProcessor(),
        Gemma3ImageProcessor(do_pan_and_scan=True),
        Qwen2VLImageProcessor(size=dict(QWEN), do_resize=False),
        SimpleNamespace(do_resize=True, resample=3, size={"height": 8, "width": 8}),
        None,
    ],
)
def test_without_a_limit_that_is_certain_a_picture_is_left_alone(processor):
    assert decoder(processor)(encoded(grainy((900, 600)))).size == (900, 600)
    assert Decoder()(encoded(grainy((900, 600)))).size == (900, 600)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_at_the_limit_no_bit_changes(form):
    data = encoded(grainy((224, 224)), form)
    same = decoder(Qwen2VLImageProcessor(size=dict(QWEN)))(data)
    assert same.tobytes() == opened(data).convert("RGB").tobytes()


@pytest.mark.parametrize(
    ("mode", "form"), [("L", "JPEG"), ("CMYK", "JPEG"), ("L", "PNG"), ("P", "PNG")]
)
def test_other_modes_become_rgb(mode, form):
    data = encoded(grainy(mode=mode), form)
    picture = decoder(Qwen2VLImageProcessor(size=dict(QWEN)))(data)
    plain = opened(data).convert("RGB").resize(picture.size, Image.Resampling.BICUBIC)
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture, dtype=float) - np.asarray(plain)).mean() < 0.5


@pytest.mark.parametrize(("form", "decoded"), [("JPEG", (750, 500)), ("PNG", (1500, 1000))])
def test_a_large_jpeg_is_never_decoded_in_full(form, decoded, monkeypatch):
    seen, resize = [], Image.Image.resize
    data = encoded(grainy(), form)
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *a, **k: seen.append(self.size) or resize(self, *a, **k)
    )
    decoder(Qwen2VLImageProcessor(size=dict(QWEN)))(data)
    assert seen == [decoded], "half of each side is still more than twice the final one"


def test_limits_of_older_configs_are_found(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 50176}'
    )
    assert decoder(AutoImageProcessor.from_pretrained(tmp_path)).size(1500, 1000) == (252, 168)


class Looking:
    """An engine that notes what it is shown."""

    def __init__(self, **own):
        self.shown: list[tuple[tuple[int, int], bytes]] = []
        vars(self).update(own)

    def generate(self, requests, sampling):
        self.shown += [(request.picture.size, request.image) for request in requests]
        return [[Completion("x", "stop", 1, 0.0)] * sampling.n for _ in requests]


def test_a_station_holds_what_the_policy_can_use_and_no_more(tmp_path):
    data = encoded(grainy())
    row = {"image_id": "a/b", "image": {"bytes": data, "path": "b"}, "sha256": "", "pixels": ""}
    row |= {"dhash": 0, "width": 1500, "height": 1000, "label": 0, "official_split": ""}
    shards.write(tmp_path / "images.parquet", [row], schemas.images(["crow"]))
    shard = Shard(
        0, tmp_path / "r-00000.parquet", tmp_path, (Query("a/b", "?"),), Sampling(1, 0, 1, 1, 9, 0)
    )
    scales = Looking(decode=decoder(Qwen2VLImageProcessor(size=dict(QWEN))))
    for engine, held in ((scales, ((252, 168), b"")), (Looking(), ((1500, 1000), data))):
        Worker(lambda engine=engine: engine).work([shard], lambda done: None)
        assert engine.shown == [held]


def test_a_policys_engines_scale_to_its_processors_limit(tmp_path):
    from tasks.engines.transformers import TransformersEngine
    from tasks.engines.vllm import _Vllm
    from training.model import tiny_policy

    words = tiny_policy.slot_words(["beetle"])
    tiny_policy.save(
        *tiny_policy.build(words, seed=0, min_pixels=28**2, max_pixels=84**2), tmp_path
    )
    for kind in (TransformersEngine, _Vllm):
        assert kind(tmp_path, ENGINE).decode.size(1500, 1000) == (84, 56)
    prompt_builder = PromptBuilder(tmp_path)
    data = encoded(grainy())
    scaled, whole = (Request("a", data, "?", decode=d) for d in (prompt_builder.decode, Decoder()))
    assert prompt_builder.tokens(scaled) == prompt_builder.tokens(whole)
