"""Vision: transformers and convolutional networks of ``vit-pytorch`` and ``transformers``."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from .architecture import Built, architecture, images
from .language import logits

SIZES = {"image_size": 32, "patch_size": 8, "num_classes": 3, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48}
WINDOWS = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def _vit_pytorch(name: str) -> Any:
    """Import a module of vit-pytorch.

    Its package imports torchvision for augmentations that no model here uses. The torchvision that the package index
    has does not load beside a torch for CPUs; an empty module stands in for it.
    """
    if "torchvision" not in sys.modules:
        torchvision = ModuleType("torchvision")
        torchvision.transforms = ModuleType("torchvision.transforms")
        sys.modules |= {"torchvision": torchvision, "torchvision.transforms": torchvision.transforms}
    from importlib import import_module

    return import_module(f"vit_pytorch.{name}")


def _classifier(name: str, **options: Any) -> Built:
    import transformers

    config = getattr(transformers, f"{name}Config")(num_labels=3, **options)
    return Built(getattr(transformers, f"{name}ForImageClassification")(config).eval(), images(), logits)


@architecture("ViT", "vit-pytorch")
def vit():
    return Built(_vit_pytorch("vit").ViT(**SIZES).eval(), images())


@architecture("SimpleViT", "vit-pytorch")
def simple_vit():
    return Built(_vit_pytorch("simple_vit").SimpleViT(**SIZES).eval(), images())


@architecture("SimpleViT, query-key norm", "vit-pytorch")
def qk_norm():
    return Built(_vit_pytorch("simple_vit_with_qk_norm").SimpleViT(**SIZES).eval(), images())


@architecture("SimpleViT, registers", "vit-pytorch")
def registers():
    return Built(_vit_pytorch("simple_vit_with_register_tokens").SimpleViT(**SIZES).eval(), images())


@architecture("SimpleViT, Fourier transform", "vit-pytorch")
def fft():
    options = SIZES | {"freq_patch_size": 8}
    return Built(_vit_pytorch("simple_vit_with_fft").SimpleViT(**options).eval(), images())


@architecture("normalized ViT", "vit-pytorch")
def normalized():
    return Built(_vit_pytorch("normalized_vit").nViT(**SIZES).eval(), images())


@architecture("DeepViT", "vit-pytorch")
def deepvit():
    return Built(_vit_pytorch("deepvit").DeepViT(**SIZES).eval(), images())


@architecture("parallel ViT", "vit-pytorch")
def parallel():
    return Built(_vit_pytorch("parallel_vit").ViT(**SIZES).eval(), images())


@architecture("CaiT", "vit-pytorch")
def cait():
    return Built(_vit_pytorch("cait").CaiT(**SIZES, cls_depth=1).eval(), images())


@architecture("RvT", "vit-pytorch")
def rvt():
    return Built(_vit_pytorch("rvt").RvT(**SIZES).eval(), images())


@architecture("PiT", "vit-pytorch")
def pit():
    return Built(_vit_pytorch("pit").PiT(**SIZES | {"depth": (1, 1), "heads": 2}).eval(), images())


@architecture("CCT", "vit-pytorch")
def cct():
    model = _vit_pytorch("cct").CCT(
        img_size=32, embedding_dim=32, num_layers=2, num_heads=2, mlp_ratio=1, num_classes=3
    )
    return Built(model.eval(), images())


@architecture("CvT", "vit-pytorch")
def cvt():
    sizes = {f"s{stage}_{key}": value for stage in (1, 2, 3) for key, value in (("emb_dim", 16), ("heads", 1))}
    depths = {f"s{stage}_depth": 1 for stage in (1, 2, 3)}
    return Built(_vit_pytorch("cvt").CvT(num_classes=3, **sizes, **depths).eval(), images())


# What torch 2.13 gives on CPUs as the gradient of a batch normalisation is wrong for one example alone, where channels
# were its last dimension before einops moved them: autograd itself differs between one example and a batch of two.
@architecture("LeViT", "vit-pytorch", cure="LeViT, batch normalisation as scale and shift")
def levit():
    model = _vit_pytorch("levit").LeViT(
        image_size=32, num_classes=3, dim=(16, 24), depth=1, heads=(1, 2), mlp_mult=2, stages=2, dim_key=8
    )
    return Built(model.eval(), images())


class ScaleAndShift(nn.Module):
    """What a batch normalisation does in eval mode."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("mean", norm.running_mean)
        self.register_buffer("scale", (norm.running_var + norm.eps).rsqrt())

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised images."""
        scale, shift = self.weight * self.scale, self.bias - self.weight * self.scale * self.mean
        return x * scale[:, None, None] + shift[:, None, None]


@architecture("LeViT, batch normalisation as scale and shift", "vit-pytorch")
def levit_scaled():
    built = levit()
    for module in list(built.model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, ScaleAndShift(child))
    return built


@architecture("MobileViT", "vit-pytorch")
def mobile_vit():
    model = _vit_pytorch("mobile_vit").MobileViT(
        image_size=(64, 64), dims=[16, 24, 32], channels=[4, 8, 8, 8, 12, 12, 16, 16, 16, 16, 24], num_classes=3
    )
    return Built(model.eval(), images(3, 64))


@architecture("MaxViT", "vit-pytorch")
def max_vit():
    model = _vit_pytorch("max_vit").MaxViT(
        num_classes=3, dim_conv_stem=8, dim=16, dim_head=8, depth=(1, 1), window_size=4, mbconv_expansion_rate=2
    )
    return Built(model.eval(), images())


@architecture("NesT", "vit-pytorch")
def nest():
    model = _vit_pytorch("nest").NesT(
        image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=2, block_repeats=(1, 1), num_classes=3
    )
    return Built(model.eval(), images())


@architecture("XCiT", "vit-pytorch")
def xcit():
    return Built(_vit_pytorch("xcit").XCiT(**SIZES, cls_depth=1).eval(), images())


def _biases_in_float64(model: nn.Module) -> None:
    """Convert the positions that a bias is made of, which are float32 whatever the model is."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.in_features == 2:
            module.register_forward_pre_hook(lambda _, positions: (positions[0].double(),))


@architecture("CrossFormer", "vit-pytorch")
def crossformer():
    model = _vit_pytorch("crossformer").CrossFormer(
        num_classes=3, dim=32, depth=1, global_window_size=(4, 2, 1, 1), local_window_size=1
    )
    return Built(model.eval(), images(3), for_float64=_biases_in_float64)


@architecture("ViT of transformers", "transformers")
def hf_vit():
    return _classifier("ViT", **ATTENTION, image_size=32, patch_size=8)


@architecture("ViT of transformers, eager attention", "transformers")
def hf_vit_eager():
    built = _classifier("ViT", **ATTENTION, image_size=32, patch_size=8)
    built.model.set_attn_implementation("eager")
    return built


@architecture("DeiT", "transformers")
def deit():
    return _classifier("DeiT", **ATTENTION, image_size=32, patch_size=8)


@architecture("DINOv2", "transformers")
def dinov2():
    return _classifier("Dinov2", **ATTENTION, image_size=28, patch_size=7)


@architecture("BEiT", "transformers")
def beit():
    return _classifier("Beit", **ATTENTION, image_size=32, patch_size=8, use_relative_position_bias=True)


@architecture("Swin", "transformers")
def swin():
    return _classifier("Swin", **WINDOWS)


@architecture("SwinV2", "transformers")
def swinv2():
    return _classifier("Swinv2", **WINDOWS)


@architecture("ResNet", "transformers")
def resnet():
    return _classifier("ResNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")


@architecture("RegNet", "transformers")
def regnet():
    return _classifier("RegNet", embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4)


@architecture("ConvNeXt", "transformers")
def convnext():
    return _classifier("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)


@architecture("ConvNeXt V2", "transformers")
def convnextv2():
    return _classifier("ConvNextV2", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)


@architecture("EfficientNet", "transformers")
def efficientnet():
    return _classifier("EfficientNet", width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320)


@architecture("MobileNetV2", "transformers")
def mobilenet():
    return _classifier("MobileNetV2", depth_multiplier=0.25, min_depth=4, image_size=32)


@architecture("PoolFormer", "transformers")
def poolformer():
    return _classifier("PoolFormer", hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1])


@architecture("PVT", "transformers")
def pvt():
    return _classifier(
        "Pvt", image_size=32, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2]
    )


@architecture("SegFormer", "transformers")
def segformer():
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    config = SegformerConfig(
        num_labels=2,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
    )
    model = SegformerForSemanticSegmentation(config).eval()
    return Built(model, images(3), lambda output: output.logits.mean(dim=(2, 3)))


@architecture("YOLOS", "transformers")
def yolos():
    from transformers import YolosConfig, YolosForObjectDetection

    config = YolosConfig(**ATTENTION, image_size=[32, 32], patch_size=8, num_detection_tokens=3, num_labels=2)
    return Built(YolosForObjectDetection(config).eval(), images(), lambda output: output.pred_boxes[:, 0])


@architecture("CLIP vision tower", "transformers")
def clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(**ATTENTION, image_size=32, patch_size=8)
    return Built(CLIPVisionModel(config).eval(), images(), lambda output: output.pooler_output[:, :3])
