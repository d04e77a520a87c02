"""Published values in the scale of our metrics, and the rows and columns that are about a run."""

import pytest

from calib_lightning.metrics import METRICS, OOD
from calib_lightning.utils.published import UNITS, published_table, row_of, tables_about

from .paper_cells import CELLS, INDEX

# copied from the papers by hand, with the scale worked out by hand
VALUES = [
    ("refcal/headline", "refcal", "cifar100_lt/resnet50", "accuracy", 0.5881, None, "58.81"),
    ("refcal/headline", "crl", "cifar100_lt/resnet50", "ovo_auroc", 0.937, None, "93.7"),
    ("refcal/headline", "refcal", "cifar100_lt/resnet50", "ece", 0.08, None, "0.08"),
    ("dark_side/table1", "ts", "imagenet_v2/resnet50", "brier", 0.4880, None, "48.80"),
    ("dark_side/table2", "baseline", "cifar10/vgg16", "brier", 0.1092, 0.0020, "10.92 ± 0.20"),
    ("dark_side/table2", "ls", "cifar100/densenet121", "ece", 0.0822, 0.0002, "8.22 ± 0.02"),
    ("dark_side/table2", "ls", "cifar10/resnet50", "correctness_auroc", 0.7346, 0.0141, "73.46 ± 1.41"),
    ("dark_side/table3", "fl", "cifar10_2/vgg16", "brier", 0.3305, 0.0036, "33.05 ± 0.36"),
    ("dark_side/table4", "confidnet", "cifar100/vgg16", "ece", 0.1395, 0.027, "13.95 ± 2.7"),
    ("neural_clamping/table1", "vs", "bloodmnist/resnet50", "classwise_ece", 0.009264, 0.000574, "0.9264 ± 0.0574"),
    ("neural_clamping/table1", "nc_fl", "bloodmnist/resnet50", "entropy", 0.4204, 0.0004, "0.4204 ± 0.0004"),
    ("neural_clamping/table2", "ms", "cifar100/wrn40_10", "aece_official", 0.2612, 0.0015, "26.12 ± 0.15"),
    ("neural_clamping/table3", "uncalibrated", "imagenet/resnet101", "classwise_ece", 0.000318, None, "0.3180"),
    ("neural_clamping/table4", "output_only", "cifar100/resnet110", "entropy", 0.9648, 0.0046, "0.9648 ± 0.46"),
    ("mac_cal/table1", "acls", "cifar10/resnet50", "ece", 0.024, None, "2.40"),
    ("mac_cal/table2", "plp", "cifar10", "ood_auroc", 0.9153, None, "91.53"),
    ("mac_cal/table2", "mac_cal", "cifar100", "ood_fpr95", 0.7706, None, "77.06"),
    ("mac_cal/table3", "mmce+mac_cal", "tiny_imagenet", "accuracy", 0.6043, None, "60.43"),
    ("mac_cal/table5", "gradient_restriction", "cifar10/densenet121", "mce", 0.7502, None, "75.02"),
    ("mac_cal/table5", "static_sparsity", "cifar100/densenet121", "aece_official", 0.0196, None, "1.96"),
]


@pytest.mark.parametrize(("choice", "row", "column", "metric", "value", "std", "text"), VALUES)
def test_values_by_hand(choice, row, column, metric, value, std, text):
    for table in (published_table(choice), published_table(f"{choice}/{column}")):
        found = table.rows[row].values[column][metric]
        assert (found.value, found.std, found.text) == (value, std, text)


def test_every_metric_of_the_index_has_a_unit():
    names = {name for known in INDEX.values() for table in known["tables"].values() for name in table["metrics"]}
    assert names == set(UNITS)
    assert {name for name, unit in UNITS.items() if unit is None} == {"seconds"}
    assert {unit.metric for unit in UNITS.values() if unit} <= set(METRICS | OOD)


def test_values_are_those_of_the_cells():
    tables = {
        f"{paper}/{name}": published_table(f"{paper}/{name}") for paper in INDEX for name in INDEX[paper]["tables"]
    }
    seen = 0
    for cell in CELLS:
        paper, name, row, column = cell.where
        table = tables[f"{paper}/{name}"]
        shown = column.partition("/")[0] if cell.averaged else column
        found = table.rows[row].values.get(shown, {}) if row in table.rows else {}
        assert [value.unit for value in found.values()] == [unit for unit in cell.published if UNITS[unit]]
        for metric, value in found.items():
            printed = str(cell.published[value.unit])
            assert value.text == printed or float(value.text) == float(printed)
            assert (METRICS | OOD)[metric].low <= value.value <= (METRICS | OOD)[metric].high
            assert value.std is None or 0 <= value.std < 0.04
            seen += 1
    assert seen > 1000


def test_a_whole_table():
    table = published_table("dark_side/table2")
    assert table.choice == "dark_side/table2"
    assert table.title == "CIFAR, mean and standard deviation of 3 runs"
    assert table.paper.startswith("Singh, Bay, Sengupta and Mirabile")
    assert len(table.columns) == 6
    assert list(table.rows) == ["baseline", "ts", "erl", "ls", "mx", "fl"]
    assert table.remarks == ("evaluated epoch: not reported; here the last epoch",)
    assert list(table.rows["mx"].values) == list(table.columns)
    assert list(table.rows["mx"].values["cifar10/vgg16"]) == ["brier", "ece", "correctness_auroc"]


def test_an_average_has_the_column_of_the_data():
    table = published_table("mac_cal/table3")
    assert table.columns == ("cifar10", "cifar100", "tiny_imagenet")
    of_network = published_table("mac_cal/table3/cifar10/wrn26_10")
    assert of_network == published_table("mac_cal/table3/cifar10")
    assert of_network.choice == "mac_cal/table3/cifar10"
    assert "collapse or a misprint" in table.remarks[1]


def test_what_has_no_value_is_not_there():
    assert "nc_fl" not in published_table("neural_clamping/table2/cifar100/wrn40_10").rows
    assert "nc_fl" in published_table("neural_clamping/table2").rows
    assert "mac_cal_recommended" not in published_table("mac_cal/table1").rows
    assert published_table("mac_cal/table4").rows == {}


@pytest.mark.parametrize(
    ("choice", "method", "calibrator", "row"),
    [
        ("dark_side/table2", "cross_entropy", "", "baseline"),
        ("dark_side/table2", "cross_entropy", "Temperature", "ts"),
        ("dark_side/table2", "cross_entropy", "FixedTemperature_temperature=1.5", "ts"),
        ("dark_side/table2", "cross_entropy", "VectorScaling", None),
        ("dark_side/table2", "entropy_regularization", "", "erl"),
        ("dark_side/table2", "label_smoothing", "", "ls"),
        ("dark_side/table2", "mixup", "", "mx"),
        ("dark_side/table2", "mixup", "Temperature", None),
        ("dark_side/table2", "mixup+mac_cal", "", None),
        ("dark_side/table2", "focal", "", "fl"),
        ("dark_side/table2", "crl", "", None),
        ("dark_side/table4", "confidnet", "", "confidnet"),
        ("refcal/headline", "crl", "", "crl"),
        ("neural_clamping/table2", "cross_entropy", "", "uncalibrated"),
        ("neural_clamping/table2", "cross_entropy", "ECETemperature", "ts_grid"),
        ("neural_clamping/table2", "cross_entropy", "Temperature", "ts"),
        ("neural_clamping/table2", "cross_entropy", "MatrixScalingODIR", "ms_odir"),
        ("neural_clamping/table2", "cross_entropy", "MatrixScaling", "ms"),
        ("neural_clamping/table2", "cross_entropy", "NeuralClamping", "nc_fl"),
        ("neural_clamping/table2", "cross_entropy", "NeuralClamping(gammas=(0,))", "nc_ce"),
        ("neural_clamping/table2", "cross_entropy", "NeuralClamping_gammas=_0", "nc_ce"),
        ("neural_clamping/table2", "cross_entropy", "NeuralClamping(gammas=(0.0, 1.0))", "nc_fl"),
        ("neural_clamping/table4", "cross_entropy", "NeuralClamping", "nc_fl"),
        ("neural_clamping/table4", "cross_entropy", "FocalTemperature", "output_only"),
        ("mac_cal/table1", "mac_cal", "", "mac_cal"),
        ("mac_cal/table1", "cross_entropy+mac_cal", "", "mac_cal"),
        ("mac_cal/table1", "cross_entropy+mac_cal_paper", "", "mac_cal"),
        ("mac_cal/table1", "v_tst", "", "vtst"),
        ("mac_cal/table1", "mit_l", "", "mit"),
        ("mac_cal/table3", "mixup+mac_cal", "", "mixup+mac_cal"),
        ("mac_cal/table3", "mixup", "", "mixup"),
        ("mac_cal/table3", "cross_entropy+mac_cal", "", None),
        ("mac_cal/table5", "cross_entropy+mac_cal", "", "decaying_sparsity"),
        ("mac_cal/table4", "cross_entropy", "", None),
    ],
)
def test_rows_of_our_methods(choice, method, calibrator, row):
    assert row_of(published_table(choice), method, calibrator) == row


def test_rows_find_themselves():
    ablations = {"masked_retraining", "gradient_restriction", "classifier_restructure", "static_sparsity"}
    missed = set()
    for paper, known in INDEX.items():
        for name in known["tables"]:
            table = published_table(f"{paper}/{name}")
            for row, found in table.rows.items():
                if row_of(table, found.method, found.calibrator) != row:
                    missed.add(row)
    assert missed == ablations | {"ts_fl", "input_only"}


def test_rows_say_what_is_theirs():
    row = published_table("dark_side/table2").rows["ts"]
    assert (row.method, row.calibrator) == ("cross_entropy", "FixedTemperature(1.5)")
    assert row.remark == "The paper's temperature is fixed: 1.5 for CIFAR, 1.1 for ImageNet."
    assert published_table("dark_side/table1").rows["ts"].calibrator == "FixedTemperature(1.1)"
    assert published_table("mac_cal/table1").rows["mac_cal"].method == "cross_entropy+mac_cal_paper"
    clamping = published_table("neural_clamping/table2").rows["nc_ce"].calibrator
    assert clamping.startswith("NeuralClamping(gammas=(0,),start=")
    assert "{" not in clamping


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (
            ("cifar10_mac_cal", "resnet50_cifar"),
            "dark_side/table2/cifar10/resnet50 mac_cal/table1/cifar10/resnet50 mac_cal/table2/cifar10 "
            "mac_cal/table3/cifar10",
        ),
        (("cifar10", "vgg16_bn_cifar"), "dark_side/table2/cifar10/vgg16 dark_side/table4/cifar10/vgg16"),
        (("cifar10", "vgg16_bn_cifar", "shift/cifar10_1_v6"), "dark_side/table3/cifar10_1/vgg16"),
        (("cifar100", "wrn40_10"), "neural_clamping/table2/cifar100/wrn40_10"),
        (("cifar100_lt_refcal", "resnet50_cifar"), "refcal/headline/cifar100_lt/resnet50"),
        (("cifar100_lt", "resnet50_cifar"), "refcal/headline/cifar100_lt/resnet50"),
        (("imagenet", "resnet101.tv_in1k"), "neural_clamping/table3/imagenet/resnet101"),
        (("cifar10_lt", "resnet50_cifar"), ""),
        (("fashion_mnist", "resnet50_cifar"), ""),
        (("cifar10", "resnet18_cifar"), ""),
        (("", ""), ""),
    ],
)
def test_tables_about_a_run(run, expected):
    found = tables_about(*run)
    assert found == expected.split()
    assert [published_table(choice).choice for choice in found] == found


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("", "paper is ''; it must be one of refcal, dark_side, neural_clamping, mac_cal"),
        ("darkside/table2", "paper is 'darkside'.*The nearest: dark_side"),
        ("dark_side", "table of dark_side is ''; it must be one of table1, table2, table3, table4"),
        ("dark_side/table5", "table of dark_side is 'table5'; it must be one of table1"),
        ("dark_side/table2/cifar10", "column of dark_side table2 is 'cifar10'; it must be one of cifar10/vgg16, "),
        ("mac_cal/table5/cifar10/resnet50", "column of mac_cal table5 is .*The nearest: cifar10/densenet121"),
    ],
)
def test_unknown_choices(choice, message):
    with pytest.raises(ValueError, match=message):
        published_table(choice)
