"""Cuts known answers down to what a repository holds: `python3 make.py DIR`, where DIR has golden/, smollm2/ and tiny-*.

The large files are what the reference's kernels and scripts and transformers made; the README here says how. A cut
takes rows, channels, layers, tokens; no number is made anew but the logits of the tiny models, by a decoder in float64
that must agree with transformers on the large ones first. Needs numpy and safetensors.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

import torch_file

HERE = Path(__file__).parent


def load(path):
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()


def save(path, tensors, metadata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata)


# golden/

GOLDEN_ROWS = 16  # the first and the last eight: a word of residuals holds eight rows
DEQUANTIZED = 4


def golden(source):
    for path in sorted((source / "golden").glob("*.safetensors")):
        tensors, metadata = load(path)
        if path.name.startswith("g_"):
            tensors, metadata = cut_products(tensors, metadata)
        save(HERE / "golden" / path.name, tensors, metadata)


def cut_products(tensors, metadata):
    out_features = int(metadata["out_features"])
    words = [0, out_features // 8 - 1]
    rows = np.concatenate([np.arange(8 * word, 8 * word + 8) for word in words])
    cut = {name: tensors[name] for name in ("x", "dec.thresholds", "dec.selected_rows", "dec.n_rows_to_fetch")}
    cut["ap.dequant"] = tensors["ap.dequant"][rows][:DEQUANTIZED]
    cut["ap.qweight"] = tensors["ap.qweight"][:, rows]
    for name in ("ap.lut", "ap.output", "lutgemm.output", "dec.output"):
        cut[name] = tensors[name][rows]
    for name in ("lutgemm.qweight", "lutgemm.alpha", "lutgemm.q_bias"):
        cut[name] = tensors[name][..., rows]
    cut["dec.q_residual"] = tensors["dec.q_residual"][:, words]
    # Scales are nibble-major: that of row 8c + i stands at i, c.
    cut["dec.reordered_scales"] = tensors["dec.reordered_scales"].reshape(8, -1)[:, words].reshape(-1)
    return cut, metadata | {"out_features": str(len(rows)), "cut_from": f"{out_features} rows: {words} of eight"}


# smollm2/

LARGEST, SPREAD = 256, 64


def smollm2(source):
    greedy = (source / "smollm2/greedy.json").read_bytes()
    (HERE / "smollm2").mkdir(exist_ok=True)
    (HERE / "smollm2/greedy.json").write_bytes(greedy)
    tensors, _ = load(source / "smollm2/logits.safetensors")
    cut = {}
    for prompt in range(len(json.loads(greedy))):
        logits = tensors[f"p{prompt}.last_logits"]
        largest = np.argsort(-logits, kind="stable")[:LARGEST]
        ids = np.unique(np.concatenate([largest, np.arange(0, len(logits), SPREAD)])).astype(np.int32)
        cut[f"p{prompt}.ids"] = ids
        cut[f"p{prompt}.logits"] = logits[ids]
        # One number that every logit is in.
        wide = logits.astype(np.float64)
        cut[f"p{prompt}.log_sum_exp"] = np.array([np.log(np.exp(wide - wide.max()).sum()) + wide.max()])
        cut[f"p{prompt}.logprob_sum"] = tensors[f"p{prompt}.logprob_sum"]
    save(HERE / "smollm2/logits.safetensors", cut, {"cut_from": f"the {LARGEST} largest logits, and every {SPREAD}th"})


# tiny-*/

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 128, 2, 1, 64, 288
# Layers, and the width inside: a whole number of groups of 128 where there are groups.
DIRECTORIES = {"tiny-llama-ap3": (1, 192), "tiny-llama-ap3.5": (2, 192), "tiny-phi3-lutgemm4": (1, 256)}


def tiny(source):
    for name, (layers, intermediate) in DIRECTORIES.items():
        large, small = source / name, HERE / name
        small.mkdir(exist_ok=True)
        expected, metadata = load(large / "expected.safetensors")
        check_against_transformers(large, expected)
        kept = cut_directory(large, small, layers, intermediate)
        ids = expected["input_ids"] % VOCAB
        model = Decoder(*kept)
        base = model.logits(ids, residuals=False)
        made = {
            "input_ids": ids,
            "logits.base": base.astype(np.float32),
            "logits.all_residuals": model.logits(ids, residuals=True).astype(np.float32),
            "greedy.base": model.greedy(ids, len(expected["greedy.base"])),
        }
        metadata = {**metadata, "oracle": "make.py, float64, nothing rounded", "cut_from": "make.py says"}
        save(small / "expected.safetensors", made, metadata)


def check_against_transformers(directory, expected):
    """The decoder below gives transformers' logits and texts of the large directory, or this ends."""
    config = json.loads((directory / "config.json").read_text())
    files = [torch_file.read(directory / name)[0] for name in ("pytorch_model.bin", "cheatsheet.pt")]
    ids = expected["input_ids"]
    # transformers took half-precision models: sums of alphas and the rotary frequencies were rounded.
    model = Decoder(config, *files, half=True)
    for want, residuals in (("logits.base", False), ("logits.all_residuals", True)):
        off = np.abs(model.logits(ids, residuals) - expected[want]).max() / np.abs(expected[want]).max()
        print(f"{directory.name} {want}: {off:.1e} of the largest off transformers'")
        assert off < 2e-5, "another function"
    assert (model.greedy(ids, len(expected["greedy.base"])) == expected["greedy.base"]).all(), "another text"


def cut_directory(large, small, layers, intermediate):
    config = json.loads((large / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN, "intermediate_size": intermediate, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "num_hidden_layers": layers, "vocab_size": VOCAB,
    }
    (small / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = json.loads((large / "tokenizer.json").read_text())
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    tokenizer["model"]["vocab"] = {token: id for token, id in vocab.items() if id < VOCAB}
    tokenizer["model"]["merges"] = [pair for pair in merges if vocab["".join(pair)] < VOCAB]
    (small / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    if (large / "bitwidth_map.json").exists():
        widths = json.loads((large / "bitwidth_map.json").read_text())
        (small / "bitwidth_map.json").write_text(json.dumps({str(i): widths[str(i)] for i in range(layers)}))

    def storages_in_order(root):
        """Each tensor's own storage, numbered as it comes, as `torch.save` does."""
        tensors = [v for v in walk(root) if isinstance(v, torch_file.Tensor)]
        for key, tensor in enumerate(tensors):
            word, kind, _, place = tensor.storage
            tensor.storage = (word, kind, str(key), place)
        return root

    def rewrite(name, cut):
        root, others = torch_file.read(large / name)
        torch_file.write(small / name, root, others)
        assert (small / name).read_bytes() == (large / name).read_bytes(), "not as PyTorch writes it"
        root = storages_in_order(cut(root))
        torch_file.write(small / name, root, others)
        return root

    weights = rewrite("pytorch_model.bin", lambda root: cut_weights(root, layers, intermediate))
    residuals = rewrite("cheatsheet.pt", lambda root: [cut_residuals(layer, intermediate) for layer in root[:layers]])
    rewrite("thresholds.pt", lambda root: [cut_thresholds(layer, intermediate) for layer in root[:layers]])
    return config, weights, residuals


def walk(value):
    yield value
    if isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from walk(inner)


def rows_and_channels(module, intermediate):
    """The rows and channels that a module keeps: of fused ones, those of each part."""
    heads, kv = np.arange(HEADS * HEAD_DIM), np.arange(KV_HEADS * HEAD_DIM)
    hidden, inner = np.arange(HIDDEN), np.arange(intermediate)
    q, k, inside = 256, 128, 512  # rows of the large directories
    return {
        "q_proj": (heads, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, heads),
        "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
        "qkv_proj": (np.concatenate([heads, q + kv, q + k + kv]), hidden),
        "gate_up_proj": (np.concatenate([inner, inside + inner]), hidden),
    }[module.split(".")[-1]]


def keep(tensor, values):
    return torch_file.Tensor(tensor.storage, values)


def cut_weights(weights, layers, intermediate):
    cut = {}
    for name, tensor in weights.items():
        parts = name.split(".")
        if parts[1] == "layers" and int(parts[2]) >= layers:
            continue
        values = tensor.values
        if parts[-1] == "weight" and len(values.shape) == 2:
            values = values[:VOCAB, :HIDDEN]
        elif parts[-1] == "weight":
            values = values[:HIDDEN]
        else:
            rows, channels = rows_and_channels(".".join(parts[:-1]), intermediate)
            if parts[-1] == "qweight":
                values = pack(unpack(values)[:, rows][..., channels])
            elif parts[-1].startswith("lut"):
                values = values[rows]
            elif parts[-1] == "binary":
                values = values[:len(channels) // 32, :, rows]
            elif parts[-1] in ("alpha", "q_bias"):
                group = 32 * weights[".".join([*parts[:-1], "binary"])].values.shape[0] // values.shape[0]
                assert len(channels) % group == 0, "whole groups"
                values = values[:len(channels) // group, ..., rows]
            else:
                raise ValueError(name)
        cut[name] = keep(tensor, np.ascontiguousarray(values))
    return cut


def cut_residuals(layer, intermediate):
    cut = {}
    for module, parts in layer.items():
        rows, channels = rows_and_channels(module, intermediate)
        words = rows[::8] // 8
        assert (rows.reshape(-1, 8) == 8 * words[:, None] + np.arange(8)).all(), "whole words of eight rows"
        scales = parts["reordered_scales"].values.reshape(8, -1)[:, words].reshape(-1)
        values = {"reordered_scales": scales, "cheatsheet": parts["cheatsheet"].values[channels][:, words]}
        cut[module] = {name: keep(tensor, np.ascontiguousarray(values[name])) for name, tensor in parts.items()}
    return cut


def cut_thresholds(layer, intermediate):
    cut = {}
    for module, tensor in layer.items():
        _, channels = rows_and_channels(module, intermediate)
        cut[module] = keep(tensor, tensor.values[channels])
    return cut


def places(channels):
    """Word and bit of every channel of an AnyPrec row."""
    k = np.arange(channels)
    tile, inside = k // 1024, k % 1024
    words = np.where((tile + 1) * 1024 <= channels, 32, channels % 1024 // 32)
    return 32 * tile + inside // 8 % words, 31 - 8 * (inside // 8 // words) - inside % 8


def unpack(planes):
    """Bits of every code, `[planes, rows, channels]`."""
    word, bit = places(32 * planes.shape[2])
    return planes.view(np.uint32)[:, :, word] >> bit.astype(np.uint32) & 1


def pack(bits):
    word, bit = places(bits.shape[2])
    planes = np.zeros((*bits.shape[:2], bits.shape[2] // 32), np.uint32)
    for k in range(bits.shape[2]):
        planes[:, :, word[k]] |= bits[:, :, k] << np.uint32(bit[k])
    return planes.view(np.int32)


# A decoder in float64, straight from the formulas.


def any_prec(weights, name):
    lut = next(t.values for key, t in weights.items() if key.startswith(f"{name}.lut"))
    codes = 0
    for plane in unpack(weights[f"{name}.qweight"].values)[:int(np.log2(lut.shape[1]))]:
        codes = 2 * codes + plane.astype(np.int64)
    return np.take_along_axis(lut.astype(np.float64), codes, axis=1)


def lut_gemm(weights, name):
    binary, alpha, q_bias = (weights[f"{name}.{part}"].values for part in ("binary", "alpha", "q_bias"))
    bits = binary.view(np.uint32)[..., None] >> np.arange(32, dtype=np.uint32) & 1  # [words, planes, rows, 32]
    signs = 2.0 * bits.transpose(1, 2, 0, 3).reshape(*binary.shape[1:], -1) - 1
    group = 32 * binary.shape[0] // alpha.shape[0]
    steps, centres = (np.repeat(np.moveaxis(v.astype(np.float64), 0, -1), group, axis=-1) for v in (alpha, q_bias))
    return (signs * steps).sum(axis=0) + centres


def residual(parts):
    words, scales = (parts[name].values for name in ("cheatsheet", "reordered_scales"))
    nibbles = words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32)) & 15
    codes = nibbles.reshape(len(words), -1).astype(np.float64) - 8  # [channels, rows]
    return (codes * scales.astype(np.float64).reshape(8, -1).T.reshape(-1)).T


class Decoder:
    """Llama or Phi-3 of the reference's weights: norm, rotary attention with grouped queries, gated product."""

    def __init__(self, config, weights, residuals, half=False):
        round_ = (lambda v: v.astype(np.float16).astype(np.float64)) if half else lambda v: v
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = config.get("head_dim") or config["hidden_size"] // self.heads
        self.eps = config["rms_norm_eps"]
        theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
        self.frequencies = round_(theta ** (-np.arange(0, self.dim, 2) / self.dim))
        self.tables = {name: t.values.astype(np.float64) for name, t in weights.items() if name.endswith(".weight")}
        self.layers = []
        for layer, parts in enumerate(residuals):
            dense = {}
            for module in parts:
                name = f"model.layers.{layer}.{module}"
                whole = any_prec(weights, name) if f"{name}.qweight" in weights else round_(lut_gemm(weights, name))
                dense[module.split(".")[-1]] = (whole, whole + residual(parts[module]))
            self.layers.append(dense)

    def norm(self, h, name):
        return h / np.sqrt((h * h).mean(axis=-1, keepdims=True) + self.eps) * self.tables[f"{name}.weight"]

    def attend(self, q, k, v):
        tokens, half = len(q), self.dim // 2
        angles = np.arange(tokens)[:, None] * self.frequencies
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]

        def rotate(x):
            a, b = x[..., :half], x[..., half:]
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        q = rotate(q.reshape(tokens, self.heads, -1))
        k, v = rotate(k.reshape(tokens, self.kv_heads, -1)), v.reshape(tokens, self.kv_heads, -1)
        k, v = (np.repeat(x, self.heads // self.kv_heads, axis=1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.dim)
        scores[:, np.triu_indices(tokens, 1)[0], np.triu_indices(tokens, 1)[1]] = -np.inf
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", shares, v).reshape(tokens, -1)

    def logits(self, ids, residuals):
        h = self.tables["model.embed_tokens.weight"][ids]
        for i, layer in enumerate(self.layers):
            times = lambda name, x: x @ layer[name][residuals].T
            x = self.norm(h, f"model.layers.{i}.input_layernorm")
            q, kv = self.heads * self.dim, self.kv_heads * self.dim
            if "qkv_proj" in layer:
                parts = np.split(times("qkv_proj", x), [q, q + kv], axis=1)
            else:
                parts = [times(f"{name}_proj", x) for name in "qkv"]
            h = h + times("o_proj", self.attend(*parts))
            x = self.norm(h, f"model.layers.{i}.post_attention_layernorm")
            if "gate_up_proj" in layer:
                gate, up = np.split(times("gate_up_proj", x), 2, axis=1)
            else:
                gate, up = times("gate_proj", x), times("up_proj", x)
            h = h + times("down_proj", gate / (1 + np.exp(-gate)) * up)
        return self.norm(h, "model.norm") @ self.tables["lm_head.weight"].T

    def greedy(self, ids, count):
        text, closest = list(ids), np.inf
        for _ in range(count):
            last = self.logits(np.array(text), residuals=False)[-1]
            text.append(int(last.argmax()))
            closest = min(closest, np.diff(np.sort(last)[-2:])[0])
        print(f"the closest of {count} greedy choices is {closest:.1e} apart")
        return np.array(text[len(ids):])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python3 make.py DIR, which holds golden, smollm2 and tiny-*")
    for part in (golden, smollm2, tiny):
        part(Path(sys.argv[1]))
