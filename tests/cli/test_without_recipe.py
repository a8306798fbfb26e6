"""From a float network and a folder of images to a file that is asked, by flags alone."""

import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from qakd_plugin import QakdError
from qakd_plugin.cli import main
from qakd_plugin.cli.classifier import preprocessing_of
from qakd_plugin.cli.images import Preprocessing, labelled_files, training_files

CODE = """
import torch
from torch import nn

def build():
    head = nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(200, 3))
    return nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), head)

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 7))
"""
GRAY = ["--size", "16", "--mean", "0.5", "--std", "0.25"]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three classes of ten images, 20 wide and 24 high, told apart by their brightness; and a network that knows it."""
    (tmp_path / "my_net.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_net", raising=False)
    draw = np.random.default_rng(0)
    for index, name in enumerate(("dark", "gray", "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(10):
            pixels = 90 * index + draw.integers(0, 40, (24, 20))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "data" / name / f"{number}.png")
    return tmp_path / "data"


def test_preprocessing_is_what_torchvision_does(tmp_path):
    draw = np.random.default_rng(1)
    cases = ((40, 61, (24, 24), 30), (61, 40, (17, 22), 23), (33, 33, (20, 24), (26, 27)), (9, 30, (16, 15), 13))
    for height, width, crop, resize in cases:
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / "a.png")
        mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
        steps = torchvision.transforms.Compose(
            [
                torchvision.transforms.Resize(resize, torchvision.transforms.InterpolationMode.BICUBIC),
                torchvision.transforms.CenterCrop(crop),
                torchvision.transforms.ToTensor(),
                torchvision.transforms.Normalize(mean, std),
            ]
        )
        own = Preprocessing(crop, resize, mean, std, "bicubic")(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            torch.testing.assert_close(torch.from_numpy(own), steps(image), rtol=0, atol=1e-6)


def test_images_whose_resized_size_would_take_all_memory_are_refused(tmp_path):
    small = Preprocessing((16, 16), 256, (0.5,), (0.25,))
    for size in ((1, 60_000), (60_000, 1)):
        Image.new("L", size).save(tmp_path / "thin.png")
        with pytest.raises(QakdError, match=r"thin.png cannot be read as an image: it has \d+x\d+ pixels"):
            small(tmp_path / "thin.png")
    with pytest.raises(QakdError, match="expected a number for each channel"):
        Preprocessing((16, 16), 16, (float("nan"),), (0.25,))
    for size, resize in (((100_000, 100_000), 16), ((16, 16), 2**30)):
        with pytest.raises(QakdError, match="2\\^26 pixels at most"):
            Preprocessing(size, resize, (0.5,), (0.25,))


def test_the_authors_preprocessing_is_found():
    found, _ = preprocessing_of("torchvision:resnet50")
    assert (found.size, found.resize, found.interpolation) == ((224, 224), 232, "bilinear")
    timm = pytest.importorskip("timm")
    found, _ = preprocessing_of("timm:mobilenetv3_small_100")
    network = timm.create_model("mobilenetv3_small_100")
    steps = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False).transforms
    assert (found.resize, list(found.size), found.interpolation) == (
        steps[0].size,
        [*steps[1].size],
        steps[0].interpolation.value,
    )
    with pytest.raises(QakdError, match=r"no network of that name \(did you mean resnet50\?\)"):
        preprocessing_of("torchvision:resnet_50")


def test_a_folder_is_split_in_the_same_way_each_time(pictures):
    train, held_out = training_files(pictures)
    assert (len(train.paths), len(held_out.paths)) == (27, 3)
    assert not set(train.paths) & set(held_out.paths)
    assert held_out == training_files(pictures)[1]
    assert sorted(held_out.labels) == [0, 1, 2]
    assert labelled_files(pictures, ("none", "light", "gray", "dark")).labels[::10] == (3, 2, 1)
    with pytest.raises(QakdError, match="light is no class of the network, which knows dark, gray"):
        labelled_files(pictures, ("dark", "gray"))


def test_train_and_val_are_taken_as_they_are(pictures):
    for part in ("train", "val"):
        shutil.copytree(pictures, pictures.parent / "both" / part)
    train, held_out = training_files(pictures.parent / "both")
    assert (len(train.paths), len(held_out.paths)) == (30, 30)
    (pictures.parent / "both" / "val" / "dark").rename(pictures.parent / "both" / "val" / "black")
    with pytest.raises(QakdError, match="black is no class of the network"):
        training_files(pictures.parent / "both")


def test_flags_lead_from_a_float_network_to_answers(pictures, tmp_path, capsys):
    import my_net

    torch.manual_seed(0)
    network = my_net.build()
    images = [(torch.from_numpy(Preprocessing((16, 16), 16, (0.5,), (0.25,))(path)), label) for path, label in _pairs(pictures)]
    x, y = torch.stack([image for image, _ in images]), torch.tensor([label for _, label in images])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    assert (network(x).argmax(1) == y).all()
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    flags = ["--model", "my_net:build", "--weights", "w.safetensors", "--data", "data", *GRAY, "--batch", "9"]
    bits = ["--bits", "w4a8", "--edges", "6"]
    assert main(["distill", *flags, *bits, "--target", "onnxruntime", "--epochs", "1", "--out", "run"]) == 0
    assert "3 images held out of data" in capsys.readouterr().err
    made = ["run/recipe.yaml", "--weights", "run/student.safetensors"]
    assert main(["export", *made, "--out", "s.onnx"]) == 0
    assert main(["export-float", "run/recipe.yaml", "--out", "f.onnx"]) == 0
    metadata = {entry.key: entry.value for entry in onnx.load("s.onnx").metadata_props}
    assert '"classes": ["dark", "gray", "light"]' in metadata["qakd.images"]
    assert "edges: 6" in (tmp_path / "run/recipe.yaml").read_text()
    capsys.readouterr()
    for file in ("s.onnx", "f.onnx"):
        assert main(["val", file, "--data", "data"]) == 0
        assert capsys.readouterr().out == "accuracy: 100.00 % (88.65 to 100.00 %, 95 %, Wilson), 30 images, onnxruntime\n"
    assert main(["predict", "s.onnx", "data/gray/3.png", "data/dark/1.png", "--top", "1"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("data/gray/3.png: gray ")
    assert second.startswith("data/dark/1.png: dark ")
    assert main(["val", "s.onnx", "--recipe", "run/recipe.yaml"]) == 0
    assert "100.00 %" in (output := capsys.readouterr().out)
    assert "3 images" in output
    damaged = training_files(pictures)[1].paths[0]
    damaged.write_bytes(b"no image")
    assert main(["distill", "run/recipe.yaml", "--epochs", "1", "--out", "again"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"qakd: error: {damaged} cannot be read as an image: ")


def _pairs(folder):
    files = labelled_files(folder)
    return zip(files.paths, files.labels, strict=True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--model and --data are missing: pass a recipe"),
        (["--model", "my_net:build"], "--data is missing"),
        (["recipe.yaml", "--bits", "w4a4"], "--bits is for runs without a recipe: write it in recipe.yaml"),
        (["--model", "timm:resnet18", "--data", "data"], "--weights is missing: timm:resnet18 would teach with random weights"),
        (
            ["--model", "my_net:build", "--data", "data"],
            "does not say how its images are prepared: pass --size, --mean and --std",
        ),
        (["--model", "my_net:build", "--data", "none", *GRAY], "--data: none cannot be read: No such file"),
        (["--model", "my_net:build", "--data", "data/dark", *GRAY], "--data: data/dark holds 0 folders"),
        (["--model", "my_net:build", "--data", "data", *GRAY, "--bits", "w9a8"], "--bits: expected w8a8, w4a4 or the like"),
        (
            ["--model", "my_net:build", "--data", "data", *GRAY, "--quantize-attention"],
            "holds no attention to quantize",
        ),
        (["--model", "my_net:build", "--data", "data", *GRAY[:1], "16,16", *GRAY[2:]], "--size: expected 224, or height and"),
        (["--model", "my_net:wide", "--data", "data", *GRAY], "answers one image with [1, 7]; logits [1, 3] are needed"),
        (["--model", "my_net:build", "--data", "data", "--size", "8", *GRAY[2:]], "does not take images [1, 1, 8, 8]"),
        (
            ["--model", "my_net:build", "--data", "data", *GRAY, "--weights", "w.pt"],
            "w.pt does not fit my_net:build with 3 classes",
        ),
    ],
)
def test_what_flags_do_not_say_is_asked_for(flags, message, pictures, capsys):
    torch.save({"other": torch.ones(2)}, "w.pt")
    assert main(["distill", *flags, "--out", "run"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("qakd: error: ")
    assert message in error
    assert not Path("run").exists() or not list(Path("run").iterdir())


def _file(path, classes, names=None):
    """A network of one weight: logits are the mean brightness, times 1, 2, ..."""
    x, y = (onnx.helper.make_tensor_value_info(*one) for one in (("input", 1, ["n", 1, 16, 16]), ("logits", 1, ["n", classes])))
    nodes = [
        onnx.helper.make_node("GlobalAveragePool", ["input"], ["pooled"]),
        onnx.helper.make_node("Flatten", ["pooled"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    weight = onnx.numpy_helper.from_array(np.arange(classes, dtype=np.float32)[None], "weight")
    graph = onnx.helper.make_graph(nodes, "graph", [x], [y], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    if names is not None:
        model.metadata_props.add(key="qakd.images", value=names)
    onnx.save(model, path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["val", "three.onnx"], "pass one of them"),
        (["val", "none.onnx", "--data", "data"], "none.onnx does not exist"),
        (["val", "three.onnx", "--data", "data"], "does not say how its images are prepared"),
        (["val", "three.onnx", "--data", "data", "--size", "16"], "go together: pass all three"),
        (
            ["val", "seven.onnx", "--data", "data", *GRAY],
            "data holds 3 classes, and seven.onnx tells 7 apart without naming them",
        ),
        (["val", "damaged.onnx", "--data", "data"], "qakd.images is no JSON"),
        (["predict", "three.onnx", "my_net.py", *GRAY], "my_net.py cannot be read as an image"),
        (
            ["predict", "three.onnx", "data/dark/1.png", "--size", "8", *GRAY[2:]],
            "takes shape [any, 1, 16, 16], got [1, 1, 8, 8]",
        ),
    ],
)
def test_what_a_file_does_not_say_is_asked_for(arguments, message, pictures, capsys):
    _file("three.onnx", 3)
    _file("seven.onnx", 7)
    _file("damaged.onnx", 3, "{")
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_file_that_names_no_classes_answers_with_indices(pictures, capsys):
    _file("three.onnx", 3)
    assert main(["predict", "three.onnx", "data/light/1.png", *GRAY, "--top", "2"]) == 0
    assert capsys.readouterr().out.startswith("data/light/1.png: 2 ")
    assert main(["val", "three.onnx", "--data", "data", *GRAY]) == 0
    answered = capsys.readouterr()
    assert "taken to be in the order of their folders' names" in answered.err
    assert answered.out.startswith("accuracy: ")
