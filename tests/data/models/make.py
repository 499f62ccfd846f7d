"""Tiny random checkpoints of every supported family and their logits, made by transformers (PyTorch on a CPU).

    python tests/data/models/make.py [NAME...]        # transformers 5.24, torch 2.15; all models without names

Each directory holds `model.safetensors` and `config.json` as `save_pretrained` writes them, `published.json`, the same
configuration in the spelling that the family's real `config.json` has (`published.py`), and `expected.safetensors`:
`ids` and, computed in f32 on the stored weights, `logits` of every position. All but the first eleven models
(`SHORT_ONLY`) also have `long_ids`, a text past every window and past the context that YaRN and longrope stretch, and
`long_logits` of its last 8 positions. transformers reads all of that text with longrope's long list.

Each feature of a model is taken away in turn: logits that do not move end the script. `overlooked.json` has the fields
of the published spelling that were changed for it; `rounding.json` says how far off transformers is itself in f16 and
in bf16.
"""

import copy
import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from published import FLATTENED, MODELS, OVERLOOKED, SHORT_ONLY
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

HERE = Path(__file__).parent
LONG, KEPT = 48, 8

# How directories with a vision tower name their tensors: as most published ones do, and as newer ones do.
PUBLISHED_PREFIX = [
    ("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head."),
    ("model.vision_tower.", "vision_tower."), ("model.multi_modal_projector.", "multi_modal_projector."),
]
PREFIXES = {"mistral-small-3.1": PUBLISHED_PREFIX, "ministral-3": [], "gemma-3-4b": PUBLISHED_PREFIX}
# Its configuration says nothing of a tied head, which means tied for its class; its head is stored and counts.
STORED_HEAD = "mistral-small-3.1"


def readable(published):
    """The configuration as transformers 5 reads it: the first name of longrope asks for a field that no published
    configuration has."""
    published = copy.deepcopy(published)
    if (published.get("rope_scaling") or {}).get("type") == "su":
        published["rope_scaling"]["type"] = "longrope"
    return published


def auto(published):
    return AutoModelForImageTextToText if "vision_config" in published else AutoModelForCausalLM


def fill(model, generator, gemma):
    """Random weights: norms scatter around 1 (Gemma adds 1 to what it stores)."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            random = torch.randn(parameter.shape, generator=generator)
            parameter.copy_((not gemma) + 0.2 * random if "norm" in key else 0.3 * random)


def save(model, directory, prefixes):
    """As `save_pretrained` does it; with `prefixes`, tensors have those names, and numbers that f16 has too."""
    model.save_pretrained(directory, save_original_format=prefixes is None)
    (directory / "generation_config.json").unlink(missing_ok=True)
    if prefixes is None:
        return
    tensors = {}
    for key, tensor in load_file(directory / "model.safetensors").items():
        for full, published in prefixes:
            if key.startswith(full):
                key = published + key.removeprefix(full)
                break
        tensors[key] = tensor.half().to(tensor.dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits[0].contiguous()


def load(directory, published):
    return auto(published).from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")


def with_changes(name, changes):
    """The stored model, its configuration in the published spelling with these changes."""
    published = copy.deepcopy(MODELS[name])
    published.get("text_config", published).update(changes)
    with tempfile.TemporaryDirectory() as other:
        (Path(other) / "config.json").write_text(json.dumps(readable(published)))
        shutil.copy(HERE / name / "model.safetensors", other)
        return load(other, published)


def with_flat(name, part, value):
    """The stored model with every tensor whose name has `part` set to `value`."""
    model = load(HERE / name, MODELS[name])
    found = [p for key, p in model.named_parameters() if part in key and "vision" not in key]
    assert found, (name, part)
    with torch.no_grad():
        for parameter in found:
            parameter.fill_(value)
    return model


def check(name, long_ids, expected):
    """Every feature moves logits far beyond rounding; the published spelling says what the written one does."""
    def moved(model, by_what):
        by = ((logits(model, long_ids)[-KEPT:] - expected).abs().max() / expected.abs().max()).item()
        print(f"    {by:.5f} {by_what}")
        return by

    assert moved(with_changes(name, {}), "published spelling") == 0, name
    for model, changes in OVERLOOKED:
        assert model != name or moved(with_changes(name, changes), changes) > 0.01, (name, changes)
    for model, part, value in FLATTENED:
        assert model != name or moved(with_flat(name, part, value), f"{part} = {value}") > 0.01, (name, part)


def rms(off, expected):
    """The root mean square of differences over that of the logits."""
    return (off.square().mean().sqrt() / expected.square().mean().sqrt()).item()


def rounding(name, published):
    """How far transformers' own logits are off in the two short types: for each text, as `rms` has it."""
    expected, short = load_file(HERE / name / "expected.safetensors"), {}
    for kind in ("float16", "bfloat16"):
        model = auto(published).from_pretrained(HERE / name, dtype=kind, attn_implementation="eager")
        short[kind] = []
        for ids, wanted in [("ids", "logits"), ("long_ids", "long_logits")]:
            if ids in expected:
                wanted = expected[wanted]
                got = logits(model, expected[ids][None].long())[-len(wanted):].float()
                short[kind].append(float(f"{rms(got - wanted, wanted):.2e}"))
    return short


def make(seed, name, published):
    directory = HERE / name
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(readable(published)))
    config = AutoConfig.from_pretrained(directory)
    generator = torch.Generator().manual_seed(seed)
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings &= name != STORED_HEAD
    model = auto(published).from_config(untied, attn_implementation="eager")
    text = published.get("text_config", published)
    model = model.bfloat16() if published["torch_dtype"] == "bfloat16" else model.half()
    fill(model, generator, text["model_type"].startswith("gemma"))
    model.config.tie_word_embeddings = config.tie_word_embeddings
    save(model, directory, PREFIXES.get(name))
    (directory / "published.json").write_text(json.dumps(published, indent=1) + "\n")

    stored = load(directory, published)
    ids = torch.randint(0, text["vocab_size"], (1, 20), generator=generator)
    expected = {"ids": ids[0].int(), "logits": logits(stored, ids)}
    if name not in SHORT_ONLY:
        long_ids = torch.randint(0, text["vocab_size"], (1, LONG), generator=generator)
        long = logits(stored, long_ids)[-KEPT:].contiguous()
        expected |= {"long_ids": long_ids[0].int(), "long_logits": long}
    save_file(expected, directory / "expected.safetensors")
    size = sum(f.stat().st_size for f in directory.iterdir())
    print(name, size, "bytes, largest logit", expected["logits"].abs().max().item())
    if name not in SHORT_ONLY:
        check(name, long_ids, long)


def write(file, models):
    lines = [f"{json.dumps(name)}: {json.dumps(of)}" for name, of in models.items()]
    (HERE / file).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main():
    torch.set_num_threads(1)
    for seed, (name, published) in enumerate(MODELS.items()):
        if name in sys.argv[1:] or len(sys.argv) == 1:
            make(seed, name, published)
    changes = {name: [changes for model, changes in OVERLOOKED if model == name] for name in MODELS}
    assert all(changes.values())
    write("overlooked.json", changes)
    write("rounding.json", {name: rounding(name, published) for name, published in MODELS.items()})


if __name__ == "__main__":
    main()
