"""--help KEY says what is known of a key, and --print-config writes what a program would use."""

import sys

import pytest
import yaml

from vidssl.config import from_tree, load_config, to_tree
from vidssl.config.command_line import print_config, print_help
from vidssl.config.key_tree import KeyNode, PartNode, find_topic, first_sentence, shipped_values, tree_of
from vidssl.core.errors import UserError
from vidssl.evaluation.dense.schema import DenseConfig
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.training.finetune_schema import FinetuneConfig
from vidssl.training.schema import TrainConfig
from vidssl.zoo.config import ZooConfig

FOLDERS = ("method", "model", "data", "run")


@pytest.fixture
def help_of(capsys):
    def answer(*topics, cls=TrainConfig, folders=FOLDERS):
        print_help(["--help", *topics], cls, "About.", folders)
        return " ".join(capsys.readouterr().out.split())

    return answer


def test_the_overview_names_sections_parts_kinds_options_and_files(help_of, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vidssl/zoo_run.py"])
    text = help_of()
    assert text.startswith("About. ") and "vidssl zoo-run --help KEY" in text
    assert "method.mask which tokens the encoder sees, and which are predicted; kinds: random, " in text
    assert "run output folder, length, seed, checkpoints, safeguards" in text
    assert "--print-config" in text and "--quiet" in text and "configs/run/NAME.yaml anneal," in text


def test_a_part_lists_its_kinds_and_a_kind_its_keys(help_of):
    assert "tube The same places hidden in every time slice" in help_of("method.mask")
    text = help_of("method.mask.multiblock_3d")
    assert "method.mask.aspect=[0.75, 1.5] [float > 0, float > 0]; height over width" in text
    assert "scale (required) float > 0" in text  # a field of the list method.mask.groups
    assert "used by configs/method: jepa_sigreg" in text and "vjepa2" in text
    # the old name of the kind
    assert help_of("method.mask.blocks") == text


def test_a_key_has_its_type_default_meaning_and_published_values(help_of):
    text = help_of("optim.lr")
    assert text.startswith("optim.lr (required) float > 0; the largest, at the end of the warm-up")
    assert "in configs/method: " in text and "6.25e-4 jepa_sigreg" in text
    # a key of several kinds
    text = help_of("method.mask.ratio", "optim.eps")
    assert "with method.mask.kind=tube: method.mask.ratio=0.9" in text and "0.95 mae_4ds" in text
    assert "optim.eps=1e-08" in text
    assert "frames (required) int >= 1" in help_of("data.extra_streams")
    assert "float > 0" in help_of("method.agree.agreement.temperature")


@pytest.mark.parametrize(
    "topic, hint",
    [
        ("optim.lrr", "did you mean optim.lr?"),
        ("lr", "did you mean optim.lr?"),
        ("method.mask.multiblok_3d", "did you mean method.mask.multiblock_3d?"),
        ("optim.lr_start", "it is called optim.warmup_lr now"),
        ("method.mask.tube.ratoi", "did you mean method.mask.tube.ratio?"),
        ("optm", "did you mean optim?"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_key(topic, hint, help_of):
    with pytest.raises(UserError, match="--help") as error:
        help_of(topic)
    assert str(error.value).endswith(hint)


@pytest.mark.parametrize("cls", [TrainConfig, ProbeConfig, FinetuneConfig, DenseConfig, ZooConfig])
def test_every_topic_of_the_tree_is_found_and_described(cls, help_of):
    def walk(node):
        if isinstance(node, KeyNode):
            yield node.path
            return
        children = node.kinds if isinstance(node, PartNode) else node.children
        for name, child in children.items():
            if isinstance(node, PartNode):
                yield f"{node.path}.{name}"
                assert first_sentence(child.about), f"{node.path}.{name} has no docstring"
            yield from walk(child)

    topics = list(dict.fromkeys(walk(tree_of(cls))))
    assert len(topics) >= 10 and all(find_topic(cls, topic) for topic in topics)


def test_values_of_the_files_are_those_of_the_kind():
    (node,) = find_topic(TrainConfig, "method.mask.multiblock_2d.scale")
    assert shipped_values(node, "method") == {"[0.15, 0.2]": ["ijepa", "stop"]}
    nodes = find_topic(TrainConfig, "method.aux.weight")
    values = {node.kinds[-1][1]: shipped_values(node, "method") for node in nodes}
    assert values["sigreg"] == {"0.05": ["jepa_sigreg"]}


ARGUMENTS = {
    TrainConfig: [
        "configs/method/jepa_sigreg.yaml",
        "configs/data/vjepa_16x4.yaml",
        "model.kind=vit_tiny",
        "data.train=[a b, 'c # d']",
        "run.out=2024_01",
        "run.steps=3",
        "run.batch=24",
        "method.predictor={kind: joint, heads: 3}",
    ],
    ProbeConfig: ["configs/probe/linear.yaml", "encoder=x", "data.train=a", "data.test=b", "out=o"],
    FinetuneConfig: ["configs/finetune/folder.yaml", "encoder=x", "data.train=a", "data.test=b", "out=o"],
    DenseConfig: ["configs/dense/depth.yaml", "encoder=x", "data.test=b", "out=o", "data.format=nyu"],
    ZooConfig: ["configs/ablation/targets.yaml", "out=o"],
}


@pytest.mark.parametrize("cls", ARGUMENTS, ids=lambda cls: cls.__name__)
def test_the_printed_configuration_is_a_file_that_gives_the_same_one(cls, capsys, tmp_path):
    print_config([*ARGUMENTS[cls], "--print-config"], cls)
    text = capsys.readouterr().out
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    cfg = load_config(ARGUMENTS[cls], cls)
    assert load_config([str(file)], cls) == cfg
    assert from_tree(yaml.safe_load(text), cls, "printed") == cfg
    print_config([str(file)], cls)
    again = capsys.readouterr().out
    assert yaml.safe_load(again) == yaml.safe_load(text) == to_tree(cfg)


def test_each_printed_value_has_its_source(capsys):
    print_config([*ARGUMENTS[TrainConfig], "--print-config"], TrainConfig)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "lr: 0.000625 # configs/method/jepa_sigreg.yaml" in lines
    assert "heads: 3 # command line" in lines and "frames: 16 # configs/data/vjepa_16x4.yaml" in lines
    assert "seed: 0 # default" in lines and "train: [a b, 'c # d'] # command line" in lines
    assert all("#" in line for line in lines if not line.endswith(":"))
