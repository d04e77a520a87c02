"""Training-time methods: one file each, from the equation to the LightningModule; long ones are led on to `parts`."""

from calib_lightning.methods.acls import ACLS, ACLSLoss, acls_loss
from calib_lightning.methods.ada_focal import AdaFocal, AdaFocalLoss, ada_focal_loss, equal_mass_edges
from calib_lightning.methods.augmix import AugMix, AugMixTransform, jsd_consistency
from calib_lightning.methods.balcal import BalCAL, balcal_loss, batch_class_weights
from calib_lightning.methods.brier import Brier, BrierLoss, brier_loss
from calib_lightning.methods.class_balanced import (
    ClassBalanced,
    ClassBalancedLoss,
    class_balanced_loss,
    effective_number_weights,
)
from calib_lightning.methods.confidnet import ConfidenceSwitch, ConfidenceTuning, ConfidNet
from calib_lightning.methods.cpc import CPC, CPCLoss, cpc_loss
from calib_lightning.methods.crl import CRL, CRLLoss, correctness_ranking_loss, correctness_rate, ranking_confidence
from calib_lightning.methods.cross_entropy import CrossEntropy, CrossEntropyLoss, cross_entropy_loss
from calib_lightning.methods.dca import DCA, DCALoss, dca_penalty
from calib_lightning.methods.dual_focal import DualFocal, DualFocalLoss, dual_focal_loss
from calib_lightning.methods.entropy_regularization import (
    EntropyRegularization,
    EntropyRegularizationLoss,
    entropy_regularization_loss,
)
from calib_lightning.methods.flsd import FLSD, FLSDLoss, flsd_loss
from calib_lightning.methods.focal import Focal, FocalLoss, focal_loss
from calib_lightning.methods.focal_schedule import FocalSchedule, scheduled_gamma
from calib_lightning.methods.label_smoothing import LabelSmoothing, LabelSmoothingLoss, label_smoothing_loss
from calib_lightning.methods.ldam import LDAM, CosineHead, LDAMLoss, ldam_loss, ldam_margins
from calib_lightning.methods.logit_norm import LogitNorm, LogitNormLoss, logit_norm_loss, normalized_logits
from calib_lightning.methods.mac_cal import MaCCal, MaskedClassifier
from calib_lightning.methods.mbls import MbLS, MbLSLoss, mbls_loss
from calib_lightning.methods.mdca import MDCA, MDCALoss, mdca_penalty
from calib_lightning.methods.mit_a import MITA, MITATransform
from calib_lightning.methods.mit_l import MITL, MITLTransform, decouple, draw_ratios
from calib_lightning.methods.mixup import Mixup, MixupTransform, mix
from calib_lightning.methods.mmce import MMCE, MMCELoss, mmce_loss, mmce_penalty, weighted_mmce_penalty
from calib_lightning.methods.parts.balcal_etf import ETFBranch, simplex_etf
from calib_lightning.methods.parts.balcal_search import find_balance
from calib_lightning.methods.parts.confidnet_branch import ConfidenceHead, tcp_loss
from calib_lightning.methods.parts.mac_cal_head import MaskedBottleneck, MaskedHead, MaskedLinear, MaskedLinearHead
from calib_lightning.methods.parts.mac_cal_inference import masked_inference
from calib_lightning.methods.parts.mac_cal_rule import AdaptiveSparsity, adapt_keep_rate, decayed_step
from calib_lightning.methods.parts.refcal_loss import SimCLRLoss, SupConLoss, supcon_loss
from calib_lightning.methods.plp import PLP, block_cuts, peeling_epochs
from calib_lightning.methods.refcal import ProjectionHead, RefCal
from calib_lightning.methods.regmixup import RegMixup, RegMixupTransform
from calib_lightning.methods.tst import TST, TSTHead
from calib_lightning.methods.two_stage import TwoStage
from calib_lightning.methods.v_tst import VTST, VTSTHead, gaussian_kl

__all__ = [
    "ACLS",
    "CPC",
    "CRL",
    "DCA",
    "FLSD",
    "LDAM",
    "MDCA",
    "MITA",
    "MITL",
    "MMCE",
    "PLP",
    "TST",
    "VTST",
    "ACLSLoss",
    "AdaFocal",
    "AdaFocalLoss",
    "AdaptiveSparsity",
    "AugMix",
    "AugMixTransform",
    "BalCAL",
    "Brier",
    "BrierLoss",
    "CPCLoss",
    "CRLLoss",
    "ClassBalanced",
    "ClassBalancedLoss",
    "ConfidNet",
    "ConfidenceHead",
    "ConfidenceSwitch",
    "ConfidenceTuning",
    "CosineHead",
    "CrossEntropy",
    "CrossEntropyLoss",
    "DCALoss",
    "DualFocal",
    "DualFocalLoss",
    "ETFBranch",
    "EntropyRegularization",
    "EntropyRegularizationLoss",
    "FLSDLoss",
    "Focal",
    "FocalLoss",
    "FocalSchedule",
    "LDAMLoss",
    "LabelSmoothing",
    "LabelSmoothingLoss",
    "LogitNorm",
    "LogitNormLoss",
    "MDCALoss",
    "MITATransform",
    "MITLTransform",
    "MMCELoss",
    "MaCCal",
    "MaskedBottleneck",
    "MaskedClassifier",
    "MaskedHead",
    "MaskedLinear",
    "MaskedLinearHead",
    "MbLS",
    "MbLSLoss",
    "Mixup",
    "MixupTransform",
    "ProjectionHead",
    "RefCal",
    "RegMixup",
    "RegMixupTransform",
    "SimCLRLoss",
    "SupConLoss",
    "TSTHead",
    "TwoStage",
    "VTSTHead",
    "acls_loss",
    "ada_focal_loss",
    "adapt_keep_rate",
    "balcal_loss",
    "batch_class_weights",
    "block_cuts",
    "brier_loss",
    "class_balanced_loss",
    "correctness_ranking_loss",
    "correctness_rate",
    "cpc_loss",
    "cross_entropy_loss",
    "dca_penalty",
    "decayed_step",
    "decouple",
    "draw_ratios",
    "dual_focal_loss",
    "effective_number_weights",
    "entropy_regularization_loss",
    "equal_mass_edges",
    "find_balance",
    "flsd_loss",
    "focal_loss",
    "gaussian_kl",
    "jsd_consistency",
    "label_smoothing_loss",
    "ldam_loss",
    "ldam_margins",
    "logit_norm_loss",
    "masked_inference",
    "mbls_loss",
    "mdca_penalty",
    "mix",
    "mmce_loss",
    "mmce_penalty",
    "normalized_logits",
    "peeling_epochs",
    "ranking_confidence",
    "scheduled_gamma",
    "simplex_etf",
    "supcon_loss",
    "tcp_loss",
    "weighted_mmce_penalty",
]
