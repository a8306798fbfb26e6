"""Networks of Hugging Face, from tiny configurations: every toolkit that can hold them trains, resumes, or says why not."""

import copy

import pytest
import torch
from interruption import Stop, StopAt

import qakd_plugin as qakd
from qakd_plugin import KD, SQAKD, QakdError

transformers = pytest.importorskip("transformers")
TEXT = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
}


def _tokens(labels):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 20, (8, 6), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 4:] = 0
    columns = {"input_ids": ids, "attention_mask": mask, **labels(ids, mask)}
    return [{name: column[rows] for name, column in columns.items()} for rows in (slice(4), slice(4, 8))]


def _classifier():
    network = transformers.BertForSequenceClassification(transformers.BertConfig(num_labels=3, **TEXT))
    return network, _tokens(lambda ids, mask: {"labels": ids[:, 0] % 3}), None


def _encoder():
    match = {"last_hidden_state": qakd.Cosine(where="attention_mask"), "pooler_output": qakd.L2()}
    return transformers.BertModel(transformers.BertConfig(**TEXT)), _tokens(lambda ids, mask: {}), match


def _causal():
    network = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, use_cache=False))
    return network, _tokens(lambda ids, mask: {"labels": ids.masked_fill(mask == 0, -100)}), None


def _detector():
    config = transformers.YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=[32, 32], patch_size=16,
        num_detection_tokens=3, num_labels=2,
    )  # fmt: skip
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}] * 2
    loader = [{"pixel_values": torch.rand(2, 3, 32, 32), "labels": labels} for _ in range(2)]
    return transformers.YolosForObjectDetection(config), loader, {"logits": qakd.KL(dim=-1), "pred_boxes": qakd.L1()}


def _made(make):
    torch.manual_seed(0)
    network, loader, match = make()
    return network.eval(), loader, match


KILLED = [
    pytest.param(make, toolkit, marks=() if (row + column) % 3 == 0 else pytest.mark.matrix)
    for row, make in enumerate([_classifier, _encoder, _causal, _detector])
    for column, toolkit in enumerate(["modelopt", "pt2e", "torchao"])
]


@pytest.mark.parametrize(("make", "toolkit"), KILLED)
def test_a_killed_run_ends_with_the_same_bits(make, toolkit, tmp_path):
    network, loader, match = _made(make)
    prepared = qakd.prepare(network, loader, toolkit)
    options = {"method": SQAKD(match=match), "epochs": 1, "lr": 1e-3, "seed": 0}
    whole = qakd.distill(copy.deepcopy(prepared), network, loader, **options)
    assert any(not torch.equal(a, b) for a, b in zip(whole.model.parameters(), prepared.parameters(), strict=True))
    saved = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    with pytest.raises(Stop):
        qakd.distill(copy.deepcopy(prepared), network, loader, **options, **saved, callbacks=[StopAt(2)])
    resumed = qakd.distill(copy.deepcopy(prepared), network, loader, **options, **saved, resume=True)
    for name, value in whole.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("make", [_classifier, _causal, _detector])
def test_a_networks_own_loss_gets_its_labels_by_name(make):
    network, loader, match = _made(make)
    with torch.no_grad():
        expected = float(network(**loader[0]).loss)
    student = qakd.prepare(network, loader, "modelopt")
    result = qakd.distill(student, network, loader[:1], method=KD(match=match), task_loss="model", epochs=1, lr=0.0)
    assert result.history[0]["ce"] == pytest.approx(expected, rel=0.1)
    graph = qakd.prepare(network, loader, "pt2e")
    with pytest.raises(QakdError, match=r"takes no labels, its forward takes .*captured without them"):
        qakd.distill(graph, network, loader, method=KD(match=match), task_loss="model", epochs=1)


def test_a_cache_in_the_outputs_is_named_where_a_graph_cannot_hold_it():
    network, loader, _ = _made(_causal)
    network.config.use_cache = True
    with pytest.raises(QakdError, match=r"model\.config\.use_cache = False"):
        qakd.prepare(network, loader, "pt2e")


@pytest.mark.parametrize("make", [_classifier, _encoder, _causal])
def test_its_trainer_trains_and_evaluates_with_and_without_labels(make, tmp_path):
    from qakd_plugin.integrations.huggingface import DistillationTrainer

    network, loader, match = _made(make)
    rows = [{name: column[i] for name, column in batch.items()} for batch in loader for i in range(4)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, per_device_eval_batch_size=8, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    unlabelled = [{name: value for name, value in row.items() if name != "labels"} for row in rows]
    student = qakd.prepare(network, loader, "modelopt", weight_bits=4)
    method = SQAKD(match=match)
    trainer = DistillationTrainer(
        student, args, teacher=network, method=method, train_dataset=unlabelled, eval_dataset=unlabelled
    )
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    batch = {name: torch.stack([row[name] for row in unlabelled]) for name in unlabelled[0]}
    with torch.no_grad(), qakd.attach(student, network, method) as kd, torch.enable_grad():
        kd.eval()
        student(**batch)
        assert found == pytest.approx(float(kd.loss().detach()), rel=1e-4)
    if "labels" in rows[0]:
        trainer = DistillationTrainer(student, args, teacher=network, method=KD(), task_loss="model", train_dataset=rows)
        assert trainer.train().training_loss > 0


def test_the_quantizers_within_attention_are_refused_before_training():
    mtq = pytest.importorskip("modelopt.torch.quantization")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    network, images = transformers.ViTForImageClassification(config).eval(), torch.rand(4, 3, 16, 16)
    chosen = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    chosen["quant_cfg"].append({"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": 8, "axis": None}, "enable": True})
    student = mtq.quantize(copy.deepcopy(network), chosen, lambda model: model(images))
    with pytest.raises(qakd.UnsupportedQuantizerError, match=r"attention\.q_bmm_quantizer: .*no export form.*Disable it"):
        qakd.distill(student, network, [images], epochs=1)


def _vision():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config).eval(), {"pixel_values": torch.rand(8, 3, 16, 16)}


def _tied():
    """Its head's weight is that of its embeddings: a checkpoint holds one of them."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, use_cache=False, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(1, 20, (8, 6))}


def test_from_pretrained_refuses_a_students_folder(tmp_path):
    network, batch = _vision()
    student = qakd.prepare(network, [batch])
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(ValueError, match="quant_method"):
        transformers.ViTForImageClassification.from_pretrained(tmp_path / "student")
    network.save_pretrained(tmp_path / "float")
    assert isinstance(transformers.ViTForImageClassification.from_pretrained(tmp_path / "float"), type(network))


@pytest.mark.parametrize("make", [_vision, _tied])
def test_its_trainer_goes_on_where_it_was_stopped_and_saves_what_load_reads(make, tmp_path):
    """transformers 5 writes other names of weights than it looks for when it resumes: it logs so, and goes on without."""
    from qakd_plugin.integrations.huggingface import DistillationTrainer

    network, batch = make()
    rows = [{name: column[i] for name, column in batch.items()} for i in range(8)]
    prepared = qakd.prepare(network, [batch])

    def trainer():
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=4, report_to=[], use_cpu=True,
            learning_rate=0.05, disable_tqdm=True, seed=0,
        )  # fmt: skip
        return DistillationTrainer(copy.deepcopy(prepared), args, teacher=network, train_dataset=rows)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert any(not torch.equal(a, b) for a, b in zip(whole.model.parameters(), prepared.parameters(), strict=True))
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    whole.save_model(str(tmp_path / "end"))
    loaded = qakd.load(tmp_path / "end" / "student.safetensors", network)
    whole.model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, whole.model(**batch).logits)
    type(network)(network.config).save_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(qakd.CheckpointError, match=r"did not restore .* tensors of a checkpoint, among them"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
