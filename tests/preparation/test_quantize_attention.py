"""prepare(quantize_attention=True): the operands of attention's products are quantized, trained, saved and exported exactly."""

import copy

import modelopt.torch.opt as mto
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qakd_plugin as qakd
from qakd_plugin import LSQ, NotPreparedError, QakdError, describe, diagnose, export_onnx, prepare, use_quantizers
from qakd_plugin.bench.census import census
from qakd_plugin.deploy.canonical.graph import is_quantized, read_onnx
from qakd_plugin.placement.attention_products import AttentionProducts, open_products
from qakd_plugin.toolkits import adapter_for

TOOLKITS = ["modelopt", "pt2e"]
OPERANDS = ["q_bmm", "k_bmm", "p_bmm", "v_bmm"]


def _drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WORDS = _drawn(6, 9, 16)


class Attention(nn.Module):
    """As timm and others write it."""

    def __init__(self, causal=False, dropout=0.0):
        super().__init__()
        self.qkv, self.out, self.causal, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), causal, dropout

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, dropout_p=self.dropout if self.training else 0.0)
        return self.out(x.transpose(1, 2).flatten(2))


class Net(nn.Module):
    """A block of its own attention, and one of PyTorch's."""

    def __init__(self):
        super().__init__()
        self.first, self.attn = nn.Linear(16, 16), Attention()
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.first(x)
        return self.head(self.block(x + self.attn(x)).mean(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():  # attention that attends to something
        model.attn.qkv.weight.mul_(3)
        model.block.self_attn.in_proj_weight.mul_(3)
    return model.eval()


@pytest.fixture(scope="module", params=TOOLKITS)
def student(request, net):
    return prepare(net, [WORDS], request.param, quantize_attention=True, target="onnxruntime")


def _of_products(model):
    """Rows of describe, by place and operand."""
    rows = [row for row in describe(model).quantizers if ".products." in row.name]
    return {tuple(row.name.split(".products.")[0:1] + row.name.split(".")[-2:-1]): row for row in rows}


CASES = {
    "plain": {},
    "bool mask": {"attn_mask": torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(1)) > 0.5},
    "a row that sees nothing": {"attn_mask": torch.arange(4)[:, None] > torch.tensor([0, 0, 1, 1, 2, 2])},
    "float mask": {"attn_mask": _drawn(4, 6, seed=2).masked_fill(torch.arange(4)[:, None] == 1, float("-inf"))},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize(("case", "heads"), [*((case, (2, 4)) for case in CASES), ("plain", (2, 3, 4)), ("causal", (2, 3, 4))])
def test_without_quantizers_products_are_those_of_pytorch_gradients_too(case, heads):
    tensors = [_drawn(*heads, rows, 8, seed=rows).double().requires_grad_() for rows in (4, 6, 6)]
    tensors[2] = tensors[2].detach().roll(1, 0).requires_grad_()
    arguments = {k: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for k, x in CASES[case].items()}
    expected = F.scaled_dot_product_attention(*tensors, **arguments)
    found, weights = AttentionProducts()(*tensors, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert ((weights >= 0) & (weights <= 1)).all()
    upstream = _drawn(*expected.shape, seed=9).double()
    for ours, theirs in zip(*(torch.autograd.grad(x, tensors, upstream) for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_heads_of_keys_that_serve_several_queries_are_repeated():
    q, k, v = _drawn(2, 4, 5, 8), _drawn(2, 2, 5, 8, seed=1), _drawn(2, 2, 5, 8, seed=2)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(AttentionProducts()(q, k, v, enable_gqa=True)[0], expected)


def test_two_masks_at_once_are_refused_as_pytorch_does():
    q = _drawn(1, 1, 4, 8)
    with pytest.raises(QakdError, match="Pass the mask alone"):
        AttentionProducts()(q, q, q, attn_mask=torch.ones(4, 4, dtype=torch.bool), is_causal=True)


def test_dropout_falls_on_weights_that_are_quantized_already():
    q, products, seen = _drawn(1, 2, 16, 8), AttentionProducts(), []
    products.p_bmm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(0)
    _, weights = products(q, q, q, dropout_p=0.5)
    (before,) = seen
    torch.testing.assert_close(before.sum(-1), torch.ones(1, 2, 16))
    dropped = weights == 0
    assert 0.3 < dropped.float().mean() < 0.7
    torch.testing.assert_close(weights, (2 * before).masked_fill(dropped, 0))


def test_every_operand_of_every_product_has_a_grid_of_8_bits(student):
    rows = _of_products(student)
    assert set(rows) == {(place, operand) for place in ("attn", "block.self_attn") for operand in OPERANDS}
    for (_, operand), row in rows.items():
        assert (row.quant_min, row.quant_max) == ((0, 255) if operand == "p_bmm" else (-128, 127))


@pytest.mark.parametrize("toolkit", TOOLKITS)
def test_for_tensorrt_all_codes_are_signed_and_activation_bits_change_nothing(net, toolkit):
    rows = _of_products(prepare(net, [WORDS], toolkit, activation_bits=4, quantize_attention=True))
    assert len(rows) == 8
    assert {(row.quant_min, row.quant_max) for row in rows.values()} == {(-128, 127)}


@pytest.mark.parametrize("toolkit", TOOLKITS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_student_computes_products_of_rounded_operands_and_softmax_in_between(toolkit, causal):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(causal)).eval()
    # Of larger numbers: with PT2E, the largest that is calibrated lies between two codes.
    student = prepare(model, [1.1 * WORDS], toolkit, quantize_attention=True, target="openvino")
    rows, adapter = _of_products(student), adapter_for(student)
    adapter.freeze_ranges(student, True)
    for quantizer in adapter.quantizers(student):  # layers in floating point: products alone are compared
        adapter.switch(quantizer, ".products." in quantizer.fqn)

    def rounded(x, operand):
        row = rows["0", operand]
        return (x / row.scale_min).round().clamp(row.quant_min, row.quant_max) * row.scale_min

    own = copy.deepcopy(model[0]).double()
    q, k, v = own.qkv(WORDS.double()).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4).unbind(0)
    scores = torch.einsum("nhld,nhsd->nhls", rounded(q, "q_bmm"), rounded(k, "k_bmm")) / 8**0.5
    if causal:
        scores = torch.where(torch.arange(9)[:, None] >= torch.arange(9), scores, -1e300)
    exponentials = (scores - scores.amax(-1, keepdim=True)).exp()
    weights = rounded(exponentials / exponentials.sum(-1, keepdim=True), "p_bmm")
    mixed = torch.einsum("nhls,nhsd->nlhd", weights, rounded(v, "v_bmm")).flatten(2)
    found = student(WORDS)
    assert not torch.allclose(found, model(WORDS), atol=1e-4), "rounding shows"
    torch.testing.assert_close(found.double(), own.out(mixed), rtol=1e-4, atol=1e-5)


def test_with_all_quantizers_off_a_student_computes_what_the_network_does(student, net):
    student = copy.deepcopy(student)
    adapter = adapter_for(student)
    adapter.set_fake_quant(student, False)
    torch.testing.assert_close(student(WORDS), net(WORDS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_file_computes_the_same_with_both_operands_of_each_product_quantized(student, target, tmp_path):
    path = export_onnx(student, WORDS, tmp_path / "student.onnx", target=target).path
    products = [node for node in read_onnx(path).graph if node.op_type == "MatMul" and "products" in node.name]
    assert len(products) == 4
    assert all(is_quantized(value) for node in products for value in node.inputs)
    (logits,) = ort.InferenceSession(path).run(None, {"input": WORDS.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), student(WORDS).detach(), rtol=1e-3, atol=1e-3)
    assert not [finding for finding in diagnose(path) if finding.kind == "products of activations"]
    if target == "onnxruntime":
        assert not [name for name in census(path).float_layers if "products" in name]


def test_without_the_argument_a_file_says_that_they_are_not(net, tmp_path):
    path = export_onnx(prepare(net, [WORDS]), WORDS, tmp_path / "student.onnx", target="onnxruntime").path
    (finding,) = (one for one in diagnose(path) if one.kind == "products of activations")
    assert len(finding.layers) == 4
    assert "quantize_attention=True" in finding.advice


def test_grids_of_operands_are_learned(student):
    student = use_quantizers(copy.deepcopy(student), LSQ())
    adapter = adapter_for(student)
    adapter.set_mode(student, True)
    student(WORDS).square().sum().backward()
    learned = {q.fqn: q.module for q in adapter.quantizers(student) if ".products." in q.fqn}
    gradients = [parameter.grad for module in learned.values() for parameter in module.parameters()]
    assert len(gradients) == 8
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_a_saved_student_comes_back_with_them(student, net, tmp_path):
    student = use_quantizers(copy.deepcopy(student), LSQ())
    loaded = qakd.load(qakd.save(student, tmp_path / "student.safetensors"), net)
    assert len(_of_products(loaded)) == 8
    assert torch.equal(loaded(WORDS), student(WORDS))


def test_what_modelopt_saved_is_restored_and_its_own_function_says_how(net, tmp_path):
    student = prepare(net, [WORDS], quantize_attention=True)
    mto.save(student, tmp_path / "student.pth")
    restored = qakd.restore_modelopt(net, tmp_path / "student.pth")
    assert torch.equal(restored(WORDS), student(WORDS))
    with pytest.raises(NotPreparedError, match=r"products\.q_bmm.*restore_modelopt"):
        mto.restore(copy.deepcopy(net), tmp_path / "student.pth")


@pytest.mark.parametrize("toolkit", ["torchao", "torch_ao", "torch_ao_eager"])
def test_toolkits_without_a_place_for_them_name_those_that_have_one(net, toolkit):
    with pytest.raises(QakdError, match=f"toolkit='{toolkit}' cannot quantize products.*'modelopt' or 'pt2e'"):
        prepare(net, [WORDS], toolkit, quantize_attention=True)


def test_what_keep_names_stays_in_floating_point(net):
    student = prepare(net, [WORDS], keep=["attn"], quantize_attention=True)
    assert {place for place, _ in _of_products(student)} == {"block.self_attn"}
    assert type(student.attn) is Attention
    student = prepare(net, [WORDS], keep=["attn.products"], quantize_attention=True)
    assert {place for place, _ in _of_products(student)} == {"block.self_attn"}
    assert any(row.name.startswith("attn.qkv") for row in describe(student).quantizers)
    with pytest.raises(QakdError, match="leaves all of it"):
        prepare(net, [WORDS], keep=["attn", "block"], quantize_attention=True)


class Twice(Attention):
    def forward(self, x):
        return super().forward(super().forward(x))


class ByHand(Attention):
    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out((q @ k.transpose(-2, -1) / 4).softmax(-1) @ v)


@pytest.mark.parametrize(("kind", "reason"), [(Twice, "once in a module's forward"), (ByHand, "multiply matrices themselves")])
def test_attention_that_cannot_be_quantized_is_named_and_alone_it_is_an_error(kind, reason, caplog):
    torch.manual_seed(0)
    model = nn.Sequential(Attention(), kind()).eval()
    student = prepare(model, [WORDS], quantize_attention=True)
    assert {place for place, _ in _of_products(student)} == {"0"}
    (warning,) = (record.message for record in caplog.records if "products of attention" in record.message)
    assert warning.startswith("1: ")
    assert reason in warning
    with pytest.raises(QakdError, match=reason):
        prepare(model[1:], [WORDS], quantize_attention=True)


def test_a_network_without_attention_is_refused():
    with pytest.raises(QakdError, match="Sequential holds no attention to quantize"):
        prepare(nn.Sequential(nn.Linear(16, 5)), [WORDS], quantize_attention=True)


def test_weights_that_attention_returns_are_those_that_were_multiplied():
    torch.manual_seed(0)

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            mixed, weights = self.attn(x, x, x)
            return {"out": mixed, "weights": weights}

    model = Maps().eval()
    student = prepare(model, [WORDS], quantize_attention=True)
    found, expected = student(WORDS)["weights"], model(WORDS)["weights"]
    step = _of_products(student)["attn", "p_bmm"].scale_min
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    steps = found * 2 / step  # the mean of two heads
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)


def test_the_attention_of_other_libraries_is_found():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    images = torch.rand(2, 3, 32, 32)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    opened = open_products(vit, images)
    assert [name for name, module in opened.named_modules() if isinstance(module, AttentionProducts)] == [
        "blocks.0.attn.products"
    ]
    torch.testing.assert_close(opened(images), vit(images), rtol=1e-4, atol=1e-5)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32, "vocab_size": 50}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2, use_cache=False)).eval()
    seen = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1]])
    words = {"input_ids": torch.arange(14).reshape(2, 7), "attention_mask": seen}
    opened = open_products(llama, words)
    torch.testing.assert_close(opened(**words).logits[seen.bool()], llama(**words).logits[seen.bool()], rtol=1e-4, atol=1e-5)


def test_a_student_with_a_mask_of_whole_numbers_is_loaded(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    torch.manual_seed(0)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**small)).eval()
    mask = (torch.arange(7) < torch.tensor([[7], [4], [5], [2]])).long()
    words = {"input_ids": torch.arange(28).reshape(4, 7), "attention_mask": mask}
    student = use_quantizers(prepare(bert, [words], quantize_attention=True), LSQ())
    loaded = qakd.load(qakd.save(student, tmp_path / "student.safetensors"), bert)
    assert torch.equal(loaded(**words).logits, student(**words).logits)
