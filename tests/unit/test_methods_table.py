"""docs/methods.md has a line for each file of configs/method, as the file is now."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import methods_table

PAGE = methods_table.PAGE.read_text()


def test_the_table_is_current():
    assert methods_table.replace_table(PAGE) == PAGE, "run python tools/methods_table.py"


def test_every_method_has_a_line_of_all_columns():
    paths = sorted((methods_table.ROOT / "configs/method").glob("*.yaml"))
    assert len(paths) > 15
    for path in paths:
        cells = methods_table.cells(path)
        assert f"[{path.stem}]" in cells[0] and len(cells) == len(methods_table.COLUMNS)
        assert cells[2] in ("1", "2", "3", "1 + 2", "1 + 3"), path


def test_a_line_quotes_the_header(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "# A (Someone 2020, arXiv 2001.00001), after B (arXiv 2001.00002): it predicts.\n"
        "# Differs from x.yaml in y. Published for ViT-B (model.kind=vit_base), data/z.yaml, K400,\n"
        "# run.batch=8, 3 epochs (run.steps=9): 81.2 % fine-tuned. lr is not scaled.\n"
        "method:\n"
        "  mask: {kind: tube, ratio: 0.9}\n"
        "  score: {kind: loss, width: 8, depth: 2, momentum: [0.5, 1.0]}\n"
        "  aux: [{kind: sigreg, weight: 0.5}, {kind: koleo}]\n"
        "  agree: {kind: views, views: [{}, {count: 4}], agreement: {kind: mse}, branch: ema,\n"
        "    aux: [{kind: koleo}]}\n"
    )
    link = "https://arxiv.org/abs/2001.0000"
    assert methods_table.cells(tmp_path / "a.yaml") == [
        "[a](../configs/method/a.yaml)",
        f"[2001.00001]({link}1), [2001.00002]({link}2)",
        "1 + 2",
        "tube, ratio 0.9",
        "loss, 2 x 8, momentum 0.5 to 1",
        *[""] * 5,
        "sigreg, weight 0.5; koleo; 1 + 4 views, mse, branch ema; koleo",
        "ViT-B, K400, 3 epochs: 81.2 % fine-tuned",
    ]
