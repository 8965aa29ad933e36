#!/usr/bin/env python3
"""Makes the golden files of this folder: small random Llamas and relatives computed in float64 by Hugging Face transformers.

    python3 -m venv /tmp/venv && /tmp/venv/bin/pip install torch==2.15.0 transformers==5.23.0 safetensors==0.8.0
    /tmp/venv/bin/python tests/golden/make_golden.py [OUT_DIR]

transformers computes parts of these models in float32 whatever the model's dtype (RMSNorm, the RoPE tables, eager softmax). The three replacements below
do the same formulas in float64; the script checks that the unchanged float32 model agrees to float32 precision before it writes anything.
"""
import importlib, json, math, os, sys
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file

PINNED = {"torch": "2.15.0", "transformers": "5.23.0"}

HERE = os.path.dirname(os.path.abspath(__file__))
STEPS, B, T = 3, 2, 24
LR, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-8, 0.1

MODELS = {
    # grouped queries, head_dim * heads != hidden, llama3 scaling with a frequency in each of its three ranges
    "llama3_untied": dict(
        seed=1, clip=1.0,
        config=dict(vocab_size=37, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                    max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="llama3", rope_theta=1000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64))),
    # one kv head, tied embeddings, linear scaling
    "linear_tied": dict(
        seed=2, clip=0.25,
        config=dict(vocab_size=48, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=6,
                    max_position_embeddings=128, rms_norm_eps=1e-6, tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.0))),
    # biases on q, k and v; yarn with a frequency that is kept, one that is blended and two that are divided, and its default attention factor
    "qwen2_yarn": dict(
        seed=3, clip=1.0, family="Qwen2",
        config=dict(vocab_size=37, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    max_position_embeddings=256, rms_norm_eps=1e-6, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="yarn", rope_theta=1000.0, factor=4.0, original_max_position_embeddings=64))),
    # norms over the heads of q and k, head_dim * heads != hidden, tied; dynamic scaling in sequences longer than max_position_embeddings
    "qwen3_dynamic": dict(
        seed=4, clip=0.5, family="Qwen3",
        config=dict(vocab_size=38, hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                    max_position_embeddings=16, rms_norm_eps=1e-6, tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="dynamic", rope_theta=500.0, factor=3.0))),
    # a sliding window of exactly the sequence
    "mistral_window": dict(
        seed=5, clip=1.0, family="Mistral",
        config=dict(vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=6,
                    max_position_embeddings=64, rms_norm_eps=1e-5, tie_word_embeddings=False, sliding_window=T,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0))),
}


def inv_freq_f64(config):
    """transformers' modeling_rope_utils in float64: frequencies for sequences of T, and what cos and sin are multiplied by."""
    rope = config.rope_parameters
    kind, base = rope["rope_type"], rope["rope_theta"]
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if kind == "dynamic":
        base *= (rope["factor"] * max(T, config.max_position_embeddings) / config.max_position_embeddings - (rope["factor"] - 1)) ** (dim / (dim - 2))
    f = 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim))
    if kind in ("default", "dynamic"):
        return f, 1.0
    factor = rope["factor"]
    if kind == "linear":
        return f / factor, 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "yarn":
        def pair(rotations):
            return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dim - 1)
        assert low < high
        divided = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        assert any(0 < x < 1 for x in divided.tolist())
        return f / factor * divided + f * (1 - divided), 0.1 * math.log(factor) + 1.0
    assert kind == "llama3"
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / f
    smooth = (original / wavelength - low) / (high - low)
    out = torch.where(wavelength > original / low, f / factor, f)
    medium = ~(wavelength < original / high) & ~(wavelength > original / low)
    return torch.where(medium, (1 - smooth) * f / factor + smooth * f, out), 1.0


def norm_f64(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def rotary_f64(self, x, position_ids):
    inv_freq, factor = inv_freq_f64(self.config)
    angle = position_ids[..., None].to(torch.float64) * inv_freq
    angle = torch.cat((angle, angle), dim=-1)
    return (angle.cos() * factor).to(x.dtype), (angle.sin() * factor).to(x.dtype)


def forward(model, ids, targets):
    logits = model(input_ids=ids).logits
    return logits, F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def make(name, spec, out):
    os.makedirs(out, exist_ok=True)
    generator = torch.Generator().manual_seed(spec["seed"])
    family = spec.get("family", "Llama")
    config = getattr(transformers, family + "Config")(**spec["config"], bos_token_id=1, eos_token_id=2)
    config._attn_implementation = "sdpa"
    model = getattr(transformers, family + "ForCausalLM")(config).to(torch.float32)
    module = importlib.import_module(f"transformers.models.{family.lower()}.modeling_{family.lower()}")
    norm_class, rotary_class = getattr(module, family + "RMSNorm"), getattr(module, family + "RotaryEmbedding")
    with torch.no_grad():
        for key, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.copy_(1 + 0.1 * noise if "norm" in key else 0.3 * noise if key.endswith("bias") else noise * (0.5 if "embed" in key or "lm_head" in key else 1.2 / math.sqrt(p.shape[1])))
    model.save_pretrained(out)
    data = []
    for step in range(STEPS):
        tokens = torch.randint(0, config.vocab_size, (B, T + 1), generator=generator)
        targets = tokens[:, 1:].clone()
        if step == 1:  # some targets do not count
            targets[0, 3] = targets[1, :5] = targets[1, T - 1] = -1
        data.append((tokens[:, :-1].clone(), targets))

    with torch.no_grad():
        plain_logits, plain_loss = forward(model, *data[0])
    saved = norm_class.forward, rotary_class.forward
    norm_class.forward, rotary_class.forward = norm_f64, rotary_f64
    model = model.to(torch.float64)

    # AdamW written out: decoupled decay (none on norms and biases), clipping by min(1, clip / norm) without torch's 1e-6.
    parameters = dict(model.named_parameters())
    first = {k: torch.zeros_like(p) for k, p in parameters.items()}
    second = {k: torch.zeros_like(p) for k, p in parameters.items()}
    result = {"batch": B, "seq_len": T, "lr": LR, "beta1": BETA1, "beta2": BETA2, "eps": EPS, "weight_decay": DECAY, "clip": spec["clip"],
              "transformers": transformers.__version__, "torch": torch.__version__, "inv_freq": inv_freq_f64(config)[0].tolist(), "attention_factor": inv_freq_f64(config)[1], "steps": []}
    clipped = 0
    for step, (ids, targets) in enumerate(data):
        model.zero_grad(set_to_none=True)
        logits, loss = forward(model, ids, targets)
        loss.backward()
        grads = gradients(model)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in grads.values()))
        if step == 0:
            assert logits.dtype == torch.float64
            assert float((logits.detach() - plain_logits).abs().max()) < 1e-4 and abs(loss.item() - plain_loss.item()) < 1e-5, "float32 model disagrees"
            print(f"{name}: float32 logits differ by {float((logits.detach() - plain_logits).abs().max()):.2g}, loss by {abs(loss.item() - plain_loss.item()):.2g}")
            save_file({"logits": logits.detach().contiguous(), "logits_f32": plain_logits.contiguous()}, os.path.join(out, "logits.safetensors"))
            save_file({k: g.detach().contiguous() for k, g in grads.items()}, os.path.join(out, "gradients.safetensors"))
        result["steps"].append({"ids": ids.tolist(), "targets": targets.tolist(), "loss": loss.item(), "grad_norm": norm})
        scale = min(1.0, spec["clip"] / norm)
        clipped += scale < 1
        with torch.no_grad():
            for k, p in parameters.items():
                g = grads[k] * scale
                first[k].mul_(BETA1).add_(g, alpha=1 - BETA1)
                second[k].mul_(BETA2).add_(g * g, alpha=1 - BETA2)
                if "norm" not in k and not k.endswith("bias"):
                    p.mul_(1 - LR * DECAY)
                p.sub_(LR * (first[k] / (1 - BETA1 ** (step + 1))) / ((second[k] / (1 - BETA2 ** (step + 1))).sqrt() + EPS))
    assert clipped > 0
    save_file({k: p.detach().contiguous() for k, p in parameters.items()}, os.path.join(out, "after.safetensors"))

    # One gradient by finite differences, so that the replaced pieces are right in backward too.
    key = "model.layers.0.self_attn." + ("k_norm.weight" if family == "Qwen3" else "k_proj.bias" if family == "Qwen2" else "k_proj.weight")
    place = (3, 5) if parameters[key].dim() == 2 else (5,)
    p, ids, targets, h = parameters[key], *data[0], 1e-5
    model.zero_grad(set_to_none=True)
    forward(model, ids, targets)[1].backward()
    want = float(p.grad[place])
    with torch.no_grad():
        old = float(p[place])
        p[place] = old + h
        up = float(forward(model, ids, targets)[1])
        p[place] = old - h
        down = float(forward(model, ids, targets)[1])
        p[place] = old
    assert abs((up - down) / (2 * h) - want) < 1e-8, (up, down, want)
    norm_class.forward, rotary_class.forward = saved
    with open(os.path.join(out, "expected.json"), "w") as f:
        json.dump(result, f)
        f.write("\n")
    for file in os.listdir(out):
        os.chmod(os.path.join(out, file), 0o644)
    generation = os.path.join(out, "generation_config.json")
    if os.path.exists(generation):
        os.remove(generation)
    print(f"{name}: losses {[s['loss'] for s in result['steps']]}, gradient norms {[round(s['grad_norm'], 4) for s in result['steps']]}")


if __name__ == "__main__":
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    assert torch.__version__.split("+")[0] == PINNED["torch"] and transformers.__version__ == PINNED["transformers"], f"expected {PINNED}"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    root = sys.argv[1] if len(sys.argv) > 1 else HERE
    for name, spec in MODELS.items():
        make(name, spec, os.path.join(root, name))
