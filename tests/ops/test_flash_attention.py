import pytest
import torch
from ops.witness import DEVICE, FLOATS, TRITON, called, check, perturbing, run

from fastlora.kernels import _library, flash_attention_cpu
from fastlora.kernels import flash_attention as launchers
from fastlora.kernels._library import INTERPRET, implementations
from fastlora.ops import flash_attention
from fastlora.reference.flash_attention import _visible

HALF = FLOATS[1:]


def make(B=1, H=2, H_kv=1, T=70, T_kv=None, D=32, dtype=torch.float32, train="qkv", **masks):
    """q, k and v as a model makes them, (B, T, H, D) seen as (B, H, T, D), and masks."""

    T_kv = T if T_kv is None else T_kv
    sizes = {"q": (B, T, H, D), "k": (B, T_kv, H_kv, D), "v": (B, T_kv, H_kv, D)}
    heads = {name: torch.randn(size).to(dtype).transpose(1, 2) for name, size in sizes.items()}
    return {name: t.requires_grad_(name in train) for name, t in heads.items()} | masks


def padding(T, *real):
    """(B, T): row b has real[b] real keys, at the front if positive, at the back if negative."""
    key = torch.arange(T)
    return torch.stack([key < n if n >= 0 else key >= T + n for n in real])


def packed(*rows):
    """(rows, T) positions in sequences of the given lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])


SHAPES = {
    "one token": {"T": 1, "train": "v"},
    "one tile less one": {"T": 127},
    "one tile": {"T": 128, "H_kv": 2},
    "one tile and one": {"T": 129, "D": 64},
    "all heads of one": {"H": 4, "T": 40},
    "eight heads of one": {"B": 2, "H": 16, "H_kv": 2, "T": 17},
    "head of 80": {"T": 66, "D": 80},
    "head of 128": {"T": 66, "D": 128},
    "head of 256": {"H": 1, "T": 33, "D": 256},
    "decoding": {"B": 2, "H": 4, "H_kv": 2, "T": 1, "T_kv": 133},
    "decoding five": {"T": 5, "T_kv": 133, "D": 64},
    "a chunk of prefill": {"T": 70, "T_kv": 200},
    "more queries than keys": {"T": 90, "T_kv": 40},
    "no query": {"T": 0, "T_kv": 3},
    "no row": {"B": 0, "T": 5},
}
MASKS = {
    "full": ({"T": 130}, {"causal": False}),
    "full, other keys": ({"T": 40, "T_kv": 75}, {"causal": False}),
    "scale": ({}, {"scale": 0.3}),
    "window": ({"T": 200}, {"window": 37}),
    "window of one": ({"train": "v"}, {"window": 1}),
    "window while decoding": ({"T": 3, "T_kv": 140}, {"window": 70}),
    "right padding": ({"B": 2, "T": 150, "key_padding_mask": padding(150, 150, 61)}, {}),
    "left padding": ({"B": 2, "T": 150, "key_padding_mask": padding(150, -80, -149)}, {}),
    "padding, full": ({"B": 2, "T": 100, "key_padding_mask": padding(100, 30, -30)}, {"causal": False}),
    "padding while decoding": ({"B": 2, "T": 1, "T_kv": 90, "key_padding_mask": padding(90, -50, 90)}, {}),
    "padding with holes": ({"T": 150, "key_padding_mask": torch.arange(150)[None] % 3 > 0}, {}),
    "a row of padding alone": ({"B": 2, "T": 70, "key_padding_mask": padding(70, 0, 70)}, {}),
    "padding of 128": ({"T": 66, "D": 128, "key_padding_mask": padding(66, -40)}, {}),
    "packed": ({"B": 2, "T": 200, "position_ids": packed((64, 70, 66))}, {}),
    "packed rows": ({"B": 2, "T": 150, "position_ids": packed((50, 100), (1, 128, 21)).int()}, {}),
    "packed, window": ({"T": 200, "position_ids": packed((150, 50))}, {"window": 40}),
    "packed, cached": ({"T": 60, "T_kv": 100, "position_ids": 40 + torch.arange(60)[None]}, {}),
    "positions past the start": ({"T": 70, "position_ids": 100 + torch.arange(70)[None]}, {}),
    "positions in no order": ({"T": 150, "position_ids": torch.arange(150)[None] * 7 % 50}, {}),
    "everything": (
        {"B": 2, "T": 150, "position_ids": packed((90, 60)), "key_padding_mask": padding(150, 130, -120)},
        {"window": 50},
    ),
    "cu_seqlens": ({"T": 200, "cu_seqlens": torch.tensor([0, 64, 134, 200], dtype=torch.int32)}, {}),
    "cu_seqlens and a rest": ({"T": 90, "cu_seqlens": torch.tensor([0, 33, 33, 70], dtype=torch.int32)}, {}),
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    ours = check(flash_attention, lambda: make(**SHAPES[shape], dtype=dtype))
    assert {ours[name].dtype for name in ("output 0", "dq", "dk", "dv") if ours[name] is not None} == {dtype}


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_gradient_where_there_is_no_choice(dtype):
    """A query that sees one key: dP − delta is 0, but for the rounding of two fp32 sums of the same D products."""
    tensors, dout = make(dtype=dtype), torch.randn(1, 2, 70, 32).to(dtype)
    ours = run(flash_attention, tensors, lambda _: [dout], window=1)
    q, k, v = (tensors[name].detach().double() for name in "qkv")
    off = 2 * 32 * torch.finfo(torch.float32).eps / 2 * (dout.double() * v).abs().sum(-1, keepdim=True) * 32**-0.5
    assert (ours["dq"].abs() <= off * k.abs()).all() and (ours["dk"].abs() <= (off * q.abs()).sum(1, True)).all()


@pytest.mark.parametrize("dtype", FLOATS[:2])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, dtype):
    sizes, options = MASKS[mask]
    check(flash_attention, lambda: make(**sizes, dtype=dtype), **options)


def test_a_thousand_tokens():
    check(flash_attention, lambda: make(H=1, T=1000, dtype=torch.float16))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("operand", ["q", "k", "v", "position_ids"])
def test_the_budget_sees_a_perturbed(operand, dtype):
    def tensors():
        return make(T=66, dtype=dtype, position_ids=packed((30, 36)))

    check(flash_attention, tensors)
    with pytest.raises(AssertionError, match="over budget"):
        check(flash_attention, tensors, seen=perturbing(operand))


def test_the_budget_sees_a_perturbed_padding():
    def tensors():
        return make(T=66, key_padding_mask=padding(66, 40))

    with pytest.raises(AssertionError, match="over budget"):
        check(flash_attention, tensors, seen=lambda t: t | {"key_padding_mask": padding(66, 41)})


def test_the_window_is_that_of_transformers():
    masking = pytest.importorskip("transformers.masking_utils")
    theirs = masking.sliding_window_causal_mask_function(5)
    i, j = torch.arange(12)[:, None], torch.arange(12)
    assert torch.equal(_visible(12, 12, True, None, None, None, 5, DEVICE)[0, 0], theirs(i * 0, i * 0, i, j))


@pytest.mark.parametrize("dtype", FLOATS)
def test_queries_and_keys_out_of_sight(dtype):
    """Left padding hides every key from the padded queries: exact zeros, in the gradients too."""
    tensors = make(B=2, T=70, dtype=dtype, key_padding_mask=padding(70, -20, 0))
    ours = run(flash_attention, tensors)
    for name in ("output 0", "dq", "dk", "dv"):
        assert (ours[name][0, :, :50] == 0).all() and (ours[name][1] == 0).all(), name
        assert ours[name].isfinite().all() and (ours[name][0, :, 52:] != 0).any(), name


@pytest.mark.parametrize("layout", ["one projection", "heads first", "expanded keys", "strided", "last strided"])
def test_strides(layout):
    B, H, T, D = 2, 2, 40, 32

    def fused():
        return torch.randn(B, T, 3, H, D).permute(2, 0, 3, 1, 4)

    layouts = {
        "one projection": fused,
        "heads first": lambda: torch.randn(3, B, H, T, D),
        "expanded keys": lambda: [torch.randn(B, H, T, D), *torch.randn(2, B, 1, T, D).expand(2, B, H, T, D)],
        "strided": lambda: torch.randn(3, B, 2 * H, 3 * T, 2 * D)[:, :, ::2, ::3, :D],
        "last strided": lambda: torch.randn(3, B, H, D, T).mT,
    }

    def tensors():
        return {name: t.requires_grad_() for name, t in zip("qkv", layouts[layout](), strict=True)}

    check(flash_attention, tensors)
    leaves = tensors()
    out = flash_attention(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), torch.randn(B, H, T, D))
    assert all(t.transpose(1, 2).is_contiguous() for t in (out, *grads))


def test_expanded_gradients():
    check(flash_attention, make, incoming=lambda outputs: [torch.ones(()).expand(o.shape) for o in outputs])


@pytest.mark.parametrize("dtype", HALF)
def test_packed_is_one_by_one_to_the_bit(dtype):
    """Where sequences begin on tiles."""
    lengths = (128, 256, 90)
    tensors = make(T=sum(lengths), dtype=dtype)
    dout = torch.randn(1, 2, sum(lengths), 32).to(dtype)
    together = run(flash_attention, tensors | {"position_ids": packed(lengths)}, lambda _: [dout])
    pieces = zip(*(t.split(lengths, 2) for t in (*tensors.values(), dout)), strict=True)
    alone = [
        run(
            flash_attention,
            {"q": q.detach().requires_grad_(), "k": k.detach().requires_grad_(), "v": v},
            lambda _, d=d: [d],
        )
        for q, k, v, d in ((q, k, v.detach().requires_grad_(), d) for q, k, v, d in pieces)
    ]
    for name in ("output 0", "dq", "dk", "dv"):
        assert torch.equal(together[name], torch.cat([one[name] for one in alone], 2)), name


@pytest.mark.skipif(not TRITON, reason="the CPU kernel multiplies by whole slabs, of another width with padding")
@pytest.mark.parametrize(("T", "pad"), [(150, -128), (150, 37), (128, 37)])
def test_padded_is_unpadded_to_the_bit(T, pad):
    """In whole tiles on the left, in any number on the right.

    But dk and dv, which are sums over queries: those of a tile that padding fills up are added before others.
    """
    rest, exact = abs(pad), ("output 0", "dq") if pad > 0 and T % 128 else ("output 0", "dq", "dk", "dv")
    tensors = make(T=T, dtype=torch.float16)
    real = slice(rest, None) if pad < 0 else slice(0, T)
    longer = {name: torch.randn(1, t.shape[1], T + rest, 32).half() for name, t in tensors.items()}
    for name, t in tensors.items():
        longer[name][:, :, real] = t.detach()
        longer[name].requires_grad_()
    dout = torch.zeros(1, 2, T + rest, 32).half()
    dout[:, :, real] = torch.randn(1, 2, T, 32)
    longer["key_padding_mask"] = padding(T + rest, -T if pad < 0 else T)
    padded = run(flash_attention, longer, lambda _: [dout])
    plain = run(flash_attention, tensors, lambda _: [dout[:, :, real]])
    for name in exact:
        assert torch.equal(padded[name][:, :, real], plain[name]), name


def _tiles_with(visible, m, n):
    """How many tiles of m queries by n keys hold anything visible."""
    rows, columns = -visible.shape[-2] % m, -visible.shape[-1] % n
    padded = torch.nn.functional.pad(visible, (0, columns, 0, rows))
    return int(padded.unflatten(-1, (-1, n)).unflatten(-3, (-1, m)).any(-1).any(-2).sum())


@pytest.mark.skipif(not TRITON, reason="counts the tiles of the Triton kernels")
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({"T": 500}, {}),
        ({"T": 300}, {"causal": False}),
        ({"T": 100, "T_kv": 500}, {}),
        ({"T": 700}, {"window": 100}),
        ({"T": 600, "position_ids": packed((64, 130, 250, 156))}, {}),
        ({"T": 500, "position_ids": packed((300, 200))}, {"window": 80}),
        ({"T": 500, "key_padding_mask": padding(500, 130)}, {}),
        ({"T": 500, "key_padding_mask": padding(500, -130)}, {}),
        ({"T": 300, "key_padding_mask": padding(300, 0)}, {}),
    ],
)
def test_only_tiles_with_something_to_see_are_visited(sizes, options):
    tensors = make(H=2, H_kv=1, dtype=torch.float16, **sizes)
    q, k, v = (tensors[name].detach() for name in "qkv")
    pad, positions = tensors.get("key_padding_mask"), tensors.get("position_ids")
    causal, window = options.get("causal", True), options.get("window")
    arguments = (pad, positions, 0.2, causal, window)
    visited = torch.zeros(3, dtype=torch.int32)
    out, lse = launchers.flash_attention_fwd(q, k, v, *arguments, visited=visited[:1])
    launchers.flash_attention_bwd(out, q, k, v, out, lse, *arguments, visited=visited[1:])
    visible = _visible(q.shape[2], k.shape[2], causal, pad, None, positions, window, DEVICE)
    tiles = [launchers._choose(kernel, q, k).tile for kernel in ("fwd", "dq", "dkdv")]
    assert visited.tolist() == [2 * _tiles_with(visible, t.m, t.n) for t in tiles]


@pytest.mark.skipif(not TRITON, reason="counts the tiles of the Triton kernels")
def test_the_number_of_tiles_in_closed_form():
    """Half of them under a causal mask; a band of them in a window."""
    T = 1024
    q = torch.randn(1, 1, T, 32).half()
    t = launchers._choose("fwd", q, q).tile
    for window, expected in (
        (None, sum(-(-(i + t.m) // t.n) for i in range(0, T, t.m))),
        (65, sum((i + t.m) // t.n - max(0, i - 64) // t.n for i in range(0, T, t.m))),
    ):
        visited = torch.zeros(1, dtype=torch.int32)
        launchers.flash_attention_fwd(q, q, q, None, None, 0.2, True, window, visited=visited)
        assert visited.item() == expected


def test_far_strides_are_64_bit():
    """Heads more than 2³¹ elements apart and tokens far apart, in memory that is reserved and almost nowhere touched."""
    apart, step = 2**31 + 64, 2**24
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        memory = torch.empty(apart + 130 * step, dtype=torch.float16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    tensors = {name: t.detach() for name, t in make(H=2, H_kv=2, T=130, dtype=torch.float16).items()}
    near = flash_attention(**tensors)
    for name in "qkv":
        far = memory.as_strided((1, 2, 130, 32), (0, apart, step, 1), "qkv".index(name) * 32).copy_(tensors[name])
        assert torch.equal(flash_attention(**tensors | {name: far}), near), name


def test_what_is_saved():
    """q, k, v, out, and four bytes per query and head."""
    saved = []
    tensors = make(B=2, H=4, H_kv=2, T=40, dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = flash_attention(**tensors)
    known = {t.data_ptr() for t in (*tensors.values(), out)}
    assert {t.data_ptr() for t in saved} >= known
    others = [t for t in saved if t.data_ptr() not in known]
    assert [(tuple(t.shape), t.dtype) for t in others] == [((2, 4, 40), torch.float32)]


def test_packing_never_asks_the_host():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = {name: torch.empty(1, 2, 64, 32, requires_grad=True) for name in "qkv"}
        for packing in (
            {"cu_seqlens": torch.zeros(4, dtype=torch.int32)},
            {"position_ids": torch.zeros(1, 64, dtype=torch.int64)},
        ):
            flash_attention(**tensors, **packing).sum().backward()


def test_autocast():
    tensors = make()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = flash_attention(**tensors)
    lower = {name: t.detach().bfloat16() for name, t in tensors.items()}
    assert out.dtype == torch.bfloat16 and torch.equal(out, flash_attention(**lower))


def test_runs_our_operators():
    assert called(flash_attention, make()) == {"flash_attention_fwd": 1, "flash_attention_bwd": 1}


@pytest.mark.cpu_only(reason="what serves on a CPU")
@pytest.mark.skipif(_library.csrc_state != "loaded", reason="csrc is not loaded")
def test_which_runs_on_the_cpu(monkeypatch):
    """The fused kernel, but for dropout, for a few queries in fp32, and in 16 bits on AMX."""
    used = []
    for name in ("slabs_fwd", "slabs_bwd"):
        real = getattr(flash_attention_cpu, name)
        monkeypatch.setattr(
            flash_attention_cpu, name, lambda *args, name=name, real=real: used.append(name) or real(*args)
        )
    slabs = ["slabs_fwd", "slabs_bwd"]

    def uses(amx, dtype, T=16, **options):
        monkeypatch.setattr(flash_attention_cpu, "_has_amx", lambda: amx)
        used.clear()
        run(flash_attention, make(T=T, T_kv=16, dtype=dtype), **options)
        return list(used)

    assert [uses(False, dtype) for dtype in FLOATS] == [[], [], []]
    assert [uses(True, dtype) for dtype in FLOATS] == [[], slabs, slabs]
    assert [uses(False, dtype, T=15) for dtype in FLOATS] == [slabs, [], []]
    assert [uses(False, dtype, dropout_p=0.1) for dtype in FLOATS] == [slabs] * 3


def test_two_runs_are_bit_identical():
    tensors, dout = make(T=200, dtype=torch.bfloat16), torch.randn(1, 2, 200, 32).bfloat16()
    first, second = (run(flash_attention, tensors, lambda _: [dout]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in ("output 0", "dq", "dk", "dv"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(1, 2, 70, 32).double()}, TypeError, "q is float64, needs float32 or bfloat16 or float16"),
        ({"q": torch.zeros(2, 70, 32)}, ValueError, r"q has shape \(2, 70, 32\), needs \(any, any, any, any\)"),
        ({"q": torch.zeros(1, 2, 70, 16)}, ValueError, "q has head dimension 16, needs one from 32 to 256"),
        ({"k": torch.zeros(1, 1, 70, 64)}, ValueError, r"k has shape .*, needs \(1, any, any, 32\)"),
        ({"v": torch.zeros(1, 1, 69, 32)}, ValueError, r"v has shape .*, needs \(1, 1, 70, 32\)"),
        ({"k": torch.zeros(1, 3, 70, 32), "v": torch.zeros(1, 3, 70, 32)}, ValueError, "3 heads, needs a divisor"),
        ({"v": torch.zeros(1, 1, 70, 32).half()}, TypeError, "v is float16, needs float32"),
        ({"key_padding_mask": torch.ones(1, 69, dtype=torch.bool)}, ValueError, r"key_padding_mask .* \(1, 70\)"),
        ({"key_padding_mask": torch.ones(1, 70)}, TypeError, "key_padding_mask is float32, needs bool"),
        ({"position_ids": torch.zeros(2, 70, dtype=torch.int64)}, ValueError, r"position_ids .* \(1, 70\)"),
        ({"position_ids": torch.zeros(1, 70)}, TypeError, "position_ids is float32, needs int32 or int64"),
        ({"cu_seqlens": torch.zeros(3, dtype=torch.int64)}, TypeError, "cu_seqlens is int64, needs int32"),
        ({"window": 3, "causal": False}, ValueError, "go with causal=True"),
        ({"window": 0}, ValueError, "window is 0, needs at least 1"),
        ({"scale": 0.0}, ValueError, "scale is 0.0, needs more than 0"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p is 1.5, needs a probability"),
        ({"k": torch.zeros(1, 1, 70, 32, device="meta")}, ValueError, f"k is on meta, needs {DEVICE}"),
        (
            {"cu_seqlens": torch.zeros(3, dtype=torch.int32), "position_ids": torch.zeros(1, 70, dtype=torch.int32)},
            ValueError,
            "cu_seqlens and position_ids were both given",
        ),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=f"flash_attention: .*{message}"):
        flash_attention(**make() | change)


def test_cu_seqlens_is_for_one_row():
    with pytest.raises(ValueError, match="cu_seqlens goes with one row and T = T_kv, got B = 2"):
        flash_attention(**make(B=2), cu_seqlens=torch.zeros(3, dtype=torch.int32))


@pytest.mark.skipif(INTERPRET, reason="of the composition, and the C++ kernel in it")
def test_where_no_tile_runs_everything_is_made_on_the_device_of_q():
    """A GPU's fallback, seen from a CPU: what is made with no device named lands on meta, and would not go with q."""
    q, k, v, dout = (torch.randn(2, 3, 140, 32) for _ in range(4))
    rest = padding(140, 140, -61), packed((60, 80)), 0.2, True, 37, 0.0, None
    (_, fwd), (_, bwd) = (implementations[f"flash_attention_{one}"] for one in ("fwd", "bwd"))
    expected = fwd(q, k, v, *rest)
    gradients = bwd(dout, q, k, v, *expected, *rest)
    softmax = [torch.randn(3, 140, 140), torch.zeros(140, dtype=torch.int64), torch.full((140,), 140), None, 0.2]
    with torch.device("meta"):
        assert_equal(fwd(q, k, v, *rest), expected)
        assert_equal(bwd(dout, q, k, v, *expected, *rest), gradients)
        implementations["attention_softmax"][1](*softmax)
        implementations["attention_softmax_bwd"][1](softmax[0], *softmax)
    with pytest.raises(RuntimeError, match="no tile with dropout runs on meta; FASTLORA_ATTENTION=sdpa has one"):
        fwd(q.to("meta"), k, v, *rest[:-2], 0.1, torch.tensor(1))


def assert_equal(one, other):
    assert all(map(torch.equal, one, other))
