"""The 19 corruptions of CIFAR-C and ImageNet-C, generated: seeded by row, for any size, two tables of constants."""

from calib_lightning.data.corruptions.constants import CORRUPTIONS, SEVERITIES, TABLES, Table, table_for
from calib_lightning.data.corruptions.generate import check_corruption, corrupt, unavailable
from calib_lightning.data.corruptions.photographs import frost_photographs

__all__ = [
    "CORRUPTIONS",
    "SEVERITIES",
    "TABLES",
    "Table",
    "check_corruption",
    "corrupt",
    "frost_photographs",
    "table_for",
    "unavailable",
]
