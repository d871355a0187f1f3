"""Random models that see, as whole folders: configuration, weights, tokenizer, chat template and image processor.

Each has its family's own architecture, special tokens and way to put an image into the text, in sizes where an image
makes 4 to 20 placeholders. Unlike a real checkpoint none ever says a special token (those rows of the head are zero):
a test decides how long an answer is, and every answer is printable. Templates leave parts of a message in their order,
also LLaVA's, which would put all images first.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Idefics3Config,
    Idefics3Processor,
    LlavaConfig,
    LlavaProcessor,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLProcessor,
    SmolVLMConfig,
    SmolVLMProcessor,
)

HIDDEN = 64
_CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
_HALVES = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}

# -- families ----------------------------------------------------------------------------------------------------------
IdOf: TypeAlias = Callable[[str], int]


@dataclass(frozen=True)
class Family:
    specials: tuple[str, ...]  # the first one ends an answer
    config: Callable[[IdOf, dict[str, Any]], Any]
    processor_class: type[ProcessorMixin]
    image_processor: dict[str, Any]
    processor: dict[str, Any]
    template: str


def _llava_config(id_of: IdOf, text: dict[str, Any]) -> Any:
    return LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **_VISION, "image_size": 48, "patch_size": 16},
        image_token_index=id_of("<image>"),
        image_seq_length=9,
        tie_word_embeddings=False,
    )


def _qwen_tokens(id_of: IdOf) -> dict[str, int]:
    return {
        "image_token_id": id_of("<|image_pad|>"),
        "video_token_id": id_of("<|video_pad|>"),
        "vision_start_token_id": id_of("<|vision_start|>"),
        "vision_end_token_id": id_of("<|vision_end|>"),
        "tie_word_embeddings": False,
    }


def _mrope(text: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    return {**text, "rope_parameters": rope}


def _qwen2_vl_config(id_of: IdOf, text: dict[str, Any]) -> Any:
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": HIDDEN, "mlp_ratio": 2}
    return Qwen2VLConfig(
        text_config=_mrope(text), vision_config={**vision, "initializer_range": 0.3}, **_qwen_tokens(id_of)
    )


def _qwen2_5_vl_config(id_of: IdOf, text: dict[str, Any]) -> Any:
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": HIDDEN}
    windows = {"fullatt_block_indexes": [1], "window_size": 56, "initializer_range": 0.3}
    return Qwen2_5_VLConfig(text_config=_mrope(text), vision_config={**vision, **windows}, **_qwen_tokens(id_of))


def _idefics_config(config_class: Any) -> Callable[[IdOf, dict[str, Any]], Any]:
    def config(id_of: IdOf, text: dict[str, Any]) -> Any:
        return config_class(
            text_config={"model_type": "llama", **text},
            vision_config={**_VISION, "image_size": 56, "patch_size": 14},
            image_token_id=id_of("<image>"),
            scale_factor=2,
            tie_word_embeddings=False,
        )

    return config


_QWEN_SPECIALS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_IDEFICS_SPECIALS = (
    "<end_of_utterance>",
    "<|im_start|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    *(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)),
)
_QWEN_IMAGES = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "size": {"shortest_edge": 4 * 28 * 28, "longest_edge": 16 * 28 * 28},
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
}
_IDEFICS_IMAGES = {
    "size": {"longest_edge": 2 * 56},
    "max_image_size": {"longest_edge": 56},
    "do_image_splitting": True,
    **_HALVES,
}
_LLAVA_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 48},
    "crop_size": {"height": 48, "width": 48},
    **_HALVES,
}
_LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

FAMILIES: dict[str, Family] = {
    "llava": Family(
        ("</s>", "<image>"),
        _llava_config,
        LlavaProcessor,
        _LLAVA_IMAGES,
        {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        _LLAVA_TEMPLATE,
    ),
    "qwen2_vl": Family(_QWEN_SPECIALS, _qwen2_vl_config, Qwen2VLProcessor, _QWEN_IMAGES, {}, _QWEN_TEMPLATE),
    "qwen2_5_vl": Family(_QWEN_SPECIALS, _qwen2_5_vl_config, Qwen2_5_VLProcessor, _QWEN_IMAGES, {}, _QWEN_TEMPLATE),
    "idefics3": Family(
        _IDEFICS_SPECIALS,
        _idefics_config(Idefics3Config),
        Idefics3Processor,
        {"image_processor_type": "Idefics3ImageProcessor", **_IDEFICS_IMAGES},
        {"image_seq_len": 4},
        _IDEFICS_TEMPLATE,
    ),
    "smolvlm": Family(
        _IDEFICS_SPECIALS,
        _idefics_config(SmolVLMConfig),
        SmolVLMProcessor,
        {"image_processor_type": "SmolVLMImageProcessor", **_IDEFICS_IMAGES},
        {"image_seq_len": 4},
        _IDEFICS_TEMPLATE,
    ),
}


# -- making a folder ---------------------------------------------------------------------------------------------------
def make_tiny_vlm(family: str, folder: Path, seed: int = 0) -> Path:
    """Write a checkpoint of `family` into `folder`; the same seed gives the same weights."""
    recipe = FAMILIES[family]
    tokenizer = _tokenizer(recipe.specials)
    folder.mkdir(parents=True, exist_ok=True)
    _save_model(recipe, tokenizer, folder, seed)
    _save_tokenizer(recipe, tokenizer, folder)
    images = {**recipe.image_processor, "processor_class": recipe.processor_class.__name__}
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    processor = {**recipe.processor, "processor_class": recipe.processor_class.__name__}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2))
    return folder


def _tokenizer(specials: Iterable[str]) -> Tokenizer:
    """One token for each printable character, and one for an empty line, as the families' own tokenizers have."""
    stand_ins = {"\n": "Ċ", " ": "Ġ"}  # ByteLevel's
    names = [*specials, *(stand_ins.get(each, each) for each in _CHARACTERS), "ĊĊ"]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in specials])
    return tokenizer


def _save_model(recipe: Family, tokenizer: Tokenizer, folder: Path, seed: int) -> None:
    config = recipe.config(tokenizer.token_to_id, {**_TEXT, "vocab_size": tokenizer.get_vocab_size()})
    config.eos_token_id = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.lm_head.weight.data[: len(recipe.specials)] = 0.0
    model.generation_config.eos_token_id = 0
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


def _save_tokenizer(recipe: Family, tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": recipe.specials[0],
        "pad_token": recipe.specials[0],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(recipe.template)


# -- transformers' own view of it --------------------------------------------------------------------------------------
def load_processor(folder: Path) -> Any:
    """The family's own processor, without its video half: that needs torchvision, which nothing here needs."""
    config = json.loads((folder / "config.json").read_text())
    settings = json.loads((folder / "processor_config.json").read_text())
    processor_class = FAMILIES[config["model_type"]].processor_class
    images, tokenizer = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    if "video_processor" in processor_class.get_attributes():
        return _images_only(processor_class)(images, tokenizer, settings.get("image_seq_len", 169), template)
    settings.pop("processor_class", None)
    settings.pop("image_processor", None)
    return processor_class(images, tokenizer, chat_template=template, **settings)


def _images_only(processor_class: Any) -> Any:
    qwen = processor_class is not SmolVLMProcessor

    class ImagesOnly(processor_class):  # type: ignore[misc]
        def __init__(self, image_processor: Any, tokenizer: Any, image_seq_len: int, chat_template: str) -> None:
            self.image_token = "<|image_pad|>" if qwen else "<image>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token_id = tokenizer.convert_tokens_to_ids("<|video_pad|>") if qwen else None
            self.fake_image_token, self.global_image_token = "<fake_token_around_image>", "<global-img>"
            self.image_seq_len = image_seq_len
            self.video_processor = SimpleNamespace(num_frames=None, fps=None)  # what SmolVLM's chat template asks
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return ImagesOnly


def load_model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def generate(model: Any, inputs: Any, tokens: int) -> list[int]:
    """Transformers' own greedy tokens."""
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return list(output[0, inputs["input_ids"].shape[1] :].tolist())
