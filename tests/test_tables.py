import json

import pytest
from click.testing import CliRunner

from e3va_lite import METHODS
from e3va_lite.cli import cli

EXACT = {
    "swin_large_patch4_window7_224": {
        "fixed": 0, "bitfit": 302_484, "norm": 89_088, "partial1": 28_339_632, "adapter": 4_659_456, "lora": 4_620_288,
        "adaptformer": 4_659_456 + 48, "e3va": 1_792_512, "e3va+": 3_525_120, "e3va++": 6_990_336,
    },
    "swin_base_patch4_window7_224": {
        "fixed": 0, "bitfit": 201_656, "norm": 59_392, "partial1": 12_601_632, "adapter": 3_107_328, "lora": 3_080_192,
        "adaptformer": 3_107_328 + 48, "e3va": 1_195_008, "e3va+": 2_350_080, "e3va++": 4_660_224,
    },
}  # fmt: skip
MILLIONS = {
    "swin_large_patch4_window7_224": {"full": 194.998},
    "swin_base_patch4_window7_224": {"full": 86.745, "lorand": 1.197},
}


@pytest.mark.parametrize("backbone", EXACT)
def test_parameters_of_tables_1_and_2(backbone):
    result = CliRunner().invoke(cli, ["params", "--backbone", backbone, "--json"])
    document = json.loads(result.stdout)
    rows = {row["method"]: row for row in document["rows"]}
    assert document["backbone"] == backbone and list(rows) == list(METHODS)
    assert {method: rows[method]["trainable"] for method in EXACT[backbone]} == EXACT[backbone]
    for method, millions in MILLIONS[backbone].items():
        assert rows[method]["trainable"] / 1e6 == pytest.approx(millions, abs=0.001)
    for method, row in rows.items():  # where ours and the paper's differ, the reader is told
        differs = abs(row["trainable"] / 1e6 - row["paper_millions"]) > 0.0051
        assert differs == ("unexplained" in row["note"]), method


def test_the_standard_adapter_of_table_5():
    import torch

    from e3va_lite import build_backbone
    from e3va_lite.tables import trainable_parameters

    with torch.device("meta"):
        backbone = build_backbone("e3va", "swin_large_patch4_window7_224", adapter="standard")
    assert trainable_parameters(backbone) / 1e6 == pytest.approx(2.354, abs=0.001)
