"""The papers' recipes: configurations, networks, and loaders on tiny files in the real formats."""

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
import train as recipe
import yaml
from config import Data, read_config
from data import LAYOUTS, load
from networks import make_network
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.models import resnet18

from qakd_plugin import PACT, QKD, SQAKD, QakdError

CONFIGS = sorted((recipe.Path(recipe.__file__).parent / "configs").glob("*.yaml"))


# -- images


def _write_pickle(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Writes CIFAR as it is published, with eight images a batch, and lets torchvision take its checksums for the real ones.

    torchvision goes on comparing them before it unpickles anything; only these files, made here, are let through.
    """
    draw = np.random.default_rng(0)

    def write(kind, labels_key, classes):
        base = tmp_path / kind.base_folder
        for name in ("train_list", "test_list"):
            listed = []
            for file, _ in getattr(kind, name):
                batch = {"data": draw.integers(0, 256, (8, 3072), np.uint8), labels_key: draw.integers(0, classes, 8).tolist()}
                listed.append([file, _write_pickle(base / file, batch)])
            monkeypatch.setattr(kind, name, listed)
        meta = {kind.meta["key"]: [f"class {index}" for index in range(classes)]}
        monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": _write_pickle(base / kind.meta["filename"], meta)})
        return tmp_path

    return {
        "cifar10": lambda: write(CIFAR10, "labels", 10),
        "cifar100": lambda: write(CIFAR100, "fine_labels", 100),
    }


@pytest.fixture
def folders(tmp_path):
    """Writes trees of JPEG files: noise, one brightness per class, and the dark class in grey."""
    draw = np.random.default_rng(0)

    def paint(path, brightness):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = brightness + draw.integers(0, 50, (64, 64, 3) if brightness else (64, 64))
        Image.fromarray(pixels.astype(np.uint8)).save(path, quality=100)

    def tiny_imagenet():
        root = tmp_path / "tiny-imagenet-200"
        for index, wnid in enumerate(("n01443537", "n01629819")):
            for number in range(6):
                paint(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", 200 * index)
        lines = []
        for number, wnid in enumerate(("n01629819", "n01443537", "n01629819")):
            paint(root / "val" / "images" / f"val_{number}.JPEG", 200 * (wnid == "n01629819"))
            lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t63\t63\n")
        (root / "val" / "val_annotations.txt").write_text("".join(lines))
        return tmp_path

    def imagenet():
        for split in ("train", "val"):
            for index, wnid in enumerate(("n01440764", "n01443537")):
                for number in range(6):
                    paint(tmp_path / split / wnid / f"{number}.JPEG", 200 * index)
        return tmp_path

    return {"tiny_imagenet": tiny_imagenet, "imagenet": imagenet}


def _data(name, root, **options):
    numbers = {"batch_size": 4, "held_out": 3, "image_size": 32, "workers": 0, **options}
    return Data(name=name, root=str(root), **numbers)


@pytest.mark.parametrize(("name", "train", "classes"), [("cifar10", 40, 10), ("cifar100", 8, 100)])
def test_cifars_batches_are_read_as_they_are_published(name, train, classes, cifar):
    root = cifar[name]()
    splits = load(_data(name, root))
    assert splits.classes == classes
    assert (len(splits.train.dataset), len(splits.held_out.dataset), len(splits.test.dataset)) == (train - 3, 3, 8)
    assert not set(splits.train.dataset.indices) & set(splits.held_out.dataset.indices)
    images, labels = next(iter(splits.test))
    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    stored = pickle.loads((root / kind.base_folder / kind.test_list[0][0]).read_bytes())
    expected = stored["data"][:4].reshape(4, 3, 32, 32) / 255
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    if name == "cifar10":
        torch.testing.assert_close(images * std[:, None, None] + mean[:, None, None], torch.from_numpy(expected).float())
    assert labels.tolist() == (stored.get("labels") or stored["fine_labels"])[:4]


def test_a_pickle_that_is_not_the_published_one_is_refused_and_its_code_does_not_run(cifar, tmp_path):
    root = cifar["cifar10"]()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (ran.write_text, ("code ran",))

    (root / CIFAR10.base_folder / "data_batch_3").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(QakdError, match=r"does not hold cifar10 .*corrupted"):
        load(_data("cifar10", root))
    assert not ran.exists()


def test_tiny_imagenets_validation_images_get_the_classes_of_their_table(folders):
    splits = load(_data("tiny_imagenet", folders["tiny_imagenet"]()))
    images, labels = next(iter(splits.test))
    assert labels.tolist() == [1, 0, 1]
    assert images.shape == (3, 3, 32, 32)
    brightness = images.mean((1, 2, 3))  # bright images are class 1
    assert brightness[[0, 2]].min() > brightness[1]


def test_tiny_imagenets_table_may_name_classes_with_training_images_only(folders):
    root = folders["tiny_imagenet"]()
    table = root / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    table.write_text(table.read_text() + "val_0.JPEG\tn99999999\t0\t0\t1\t1\n")
    with pytest.raises(QakdError, match="n99999999"):
        load(_data("tiny_imagenet", root))


def test_imagenet_is_read_from_folders_of_classes(folders):
    splits = load(_data("imagenet", folders["imagenet"]()))
    assert (len(splits.train.dataset), len(splits.test.dataset), splits.classes) == (9, 12, 2)
    images, labels = next(iter(splits.train))
    assert images.shape == (4, 3, 32, 32)
    assert ((images.mean((1, 2, 3)) > 0).long() == labels).all()


def test_imagenet_with_other_classes_for_validation_is_refused(folders):
    root = folders["imagenet"]()
    (root / "val" / "n01440764").rename(root / "val" / "n00000000")
    with pytest.raises(QakdError, match="different folders of classes"):
        load(_data("imagenet", root))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folder_without_the_data_is_refused_with_the_layout(name, tmp_path):
    with pytest.raises(QakdError) as error:
        load(_data(name, tmp_path))
    assert LAYOUTS[name] in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_more_images_held_out_than_there_are_is_refused(folders):
    with pytest.raises(QakdError, match=r"held_out=12 must lie between 1 and 11"):
        load(_data("imagenet", folders["imagenet"](), held_out=12))


# -- networks


@pytest.mark.parametrize(
    ("name", "layers", "millions"), [("resnet20", 20, 0.27), ("resnet32", 32, 0.47), ("vgg8", 6, 3.9), ("vgg13", 11, 9.4)]
)
def test_the_networks_for_small_images_have_their_papers_size(name, layers, millions):
    network = make_network(name, 10).eval()
    weighted = [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)]
    assert len(weighted) + 1 == layers  # and the linear layer; shortcuts do not count
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.02)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_an_unknown_network_is_refused():
    with pytest.raises(QakdError, match="'alexnet' is unknown: use one of"):
        make_network("alexnet", 10)


# -- configurations


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_fits_its_network(path):
    config = read_config(path)
    with torch.device("meta"):
        network = make_network(config.network, 10)
    for name in config.student.keep:
        assert "weight" in network.get_submodule(name)._parameters, name
    phases = config.method.phases(config.schedule.epochs)
    assert sum(phase.epochs for phase in phases) == config.schedule.epochs
    assert all(0 < figure < 100 for figure in config.published.values())


def test_all_networks_of_the_papers_have_a_configuration():
    found = {(config.data.name, config.network) for config in map(read_config, CONFIGS)}
    expected = {"cifar10": {"resnet20", "vgg8"}, "cifar100": {"resnet32", "vgg13"}, "imagenet": {"resnet18", "mobilenet_v2"}}
    expected["tiny_imagenet"] = {"resnet18", "vgg11", "mobilenet_v2", "shufflenet_v2_x0_5", "squeezenet1_0"}
    assert found == {(data, network) for data, networks in expected.items() for network in networks}


def test_flags_replace_what_the_file_says():
    (path,) = (path for path in CONFIGS if path.stem == "tiny_imagenet_resnet18_sqakd")
    flags = ["--student.weight_bits", "3", "--quantizer", "PACT", "--settings.grad_clip", "0.5", "--method", "QKD"]
    before, after = read_config(path), read_config(path, flags)
    assert (after.student.weight_bits, after.quantizer, after.settings.grad_clip, after.method) == (3, PACT(), 0.5, QKD())
    assert (before.student.weight_bits, before.settings.grad_clip, before.method) == (4, None, SQAKD())
    assert after.data == before.data
    assert read_config(path, ["--settings.lr", "1e-4"]).settings.lr == 1e-4  # YAML 1.1 takes it for text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--student.wieght_bits", "3"], r"student: unknown key 'wieght_bits'; Student has .*did you mean weight_bits"),
        (["--settings.lr", "fast"], r"settings.lr: expected float or null, got 'fast' \(str\)"),
        (["--schedule.epochs", "1.5"], "schedule.epochs: expected int, got 1.5"),
        (["--schedule.epochs", "true"], "schedule.epochs: expected int, got True"),
        (["--quantizer", "LSW"], "quantizer: expected LSQ or PACT or DoReFa or EWGS, got 'LSW'"),
        (["--quantizer", "{class_path: config.SGD}"], "quantizer: expected LSQ or PACT or DoReFa or EWGS, got"),
        (["--quantizer", "{class_path: LSQ, init_args: {bits: 4}}"], "quantizer: unknown key 'bits'; LSQ has"),
        (["--quantizer", "{bits: 4}"], "quantizer: expected LSQ or PACT or DoReFa or EWGS, got"),
        (["--method", "{class_path: SQAKD, init_args: {temperature: -1.0}}"], "temperature=-1.0 must be positive"),
        (["--data.name", "mnist"], "data.name: expected one of 'cifar10', .*'imagenet', got 'mnist'"),
        (["--network.depth", "3"], "'network' holds a value, no section"),
        (["--student.keep", "[1]"], r"student.keep: expected tuple\[str, ...\], got \[1\]"),
        (["--settings.optimizer", "sgd"], "settings.optimizer: expected"),
        (["--seed"], "come in pairs"),
    ],
)
def test_what_a_configuration_cannot_say_is_refused_by_name(flags, message):
    with pytest.raises(QakdError, match=message):
        read_config(CONFIGS[0], flags)


def test_a_missing_key_and_a_broken_file_are_named(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("network: resnet20")
    with pytest.raises(QakdError, match=r"c.yaml: 'data' is missing"):
        read_config(path)
    path.write_text("network: [")
    with pytest.raises(QakdError, match="cannot be read as YAML"):
        read_config(path)
    path.write_text(yaml.safe_dump(["a", "list"]))
    with pytest.raises(QakdError, match="expected sections and values"):
        read_config(path)


# -- runs


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_trains_exports_and_prints_published_figures_beside_its_own(cifar, tmp_path, capsys):
    (path,) = (path for path in CONFIGS if path.stem == "cifar10_resnet20_sqakd")
    flags = ["--data.root", str(cifar["cifar10"]()), "--data.batch_size", "16", "--data.held_out", "8", "--data.workers", "0"]
    flags += ["--teacher.epochs", "1", "--schedule.epochs", "1", "--student.calibration_batches", "1"]
    flags += ["--published", "{W4A4 LSQ QAT: 12.5}"]
    out = tmp_path / "out"
    found = recipe.main([str(path), "--out", str(out), *flags])
    assert set(found) == {"FP", "W4A4 LSQ SQAKD"}
    assert json.loads((out / "accuracies.json").read_text()) == {"here": found, "published": {"W4A4 LSQ QAT": 12.5}}
    assert (out / "student.onnx").is_file()
    assert "12.50" in capsys.readouterr().out
    weights = torch.load(out / "teacher.pt", weights_only=True)
    (out / "student.onnx").unlink()
    assert recipe.main([str(path), "--out", str(out), *flags]) == found  # finds the teacher and the finished run
    assert all(torch.equal(weights[name], value) for name, value in torch.load(out / "teacher.pt", weights_only=True).items())
    assert (out / "student.onnx").is_file()


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_recipe_trains_and_exports(path, cifar, folders, tmp_path):
    root = {**cifar, **folders}[read_config(path).data.name]()
    flags = ["--data.root", str(root), "--data.batch_size", "4", "--data.held_out", "4", "--data.workers", "0"]
    flags += ["--schedule.epochs", "3", "--student.calibration_batches", "1"]
    # Rates that a handful of images bears.
    flags += ["--settings.lr", "1.0e-6", "--settings.grad_clip", "0.1", "--teacher.lr", "1.0e-5"]
    if not read_config(path).data.name.startswith("cifar"):
        flags += ["--data.image_size", "128"]
    if isinstance(read_config(path).method, QKD):
        flags += ["--method", "{class_path: QKD, init_args: {self_studying: 1, co_studying: 1, tutoring: 1}}"]
    if read_config(path).teacher.weights is None:
        flags += ["--teacher.epochs", "10"]  # BatchNorm's statistics need some steps, or signals die away in deep networks
    else:
        network = make_network(read_config(path).network, 2).train()
        for _ in range(20):
            network(torch.rand(8, 3, 64, 64))
        torch.save(network.state_dict(), tmp_path / "teacher.pt")
        flags += ["--teacher.weights", str(tmp_path / "teacher.pt")]
    found = recipe.main([str(path), "--out", str(tmp_path / "out"), *flags])
    assert len(found) == 2
    assert (tmp_path / "out" / "student.onnx").is_file()


def test_teachers_weights_of_another_network_are_refused(tmp_path):
    torch.save(resnet18(num_classes=3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(QakdError, match=r"w.pt does not fit the network"):
        recipe.load_weights(make_network("resnet18", 10), tmp_path / "w.pt")
    with pytest.raises(QakdError, match="does not fit"):
        recipe.load_weights(make_network("resnet18", 10), tmp_path / "missing.pt")
