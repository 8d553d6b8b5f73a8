"""The preprocessor_config.json of an exported folder: size and normalisation of our evaluation."""

from typing import Any

# Model type: classes of transformers that scale the short side, cut the centre and normalise, in this order.
PROCESSORS = {
    "videomae": {
        "video_processor_type": "VideoMAEVideoProcessor",
        "image_processor_type": "VideoMAEImageProcessor",
    },
    # VJEPA2VideoProcessor scales to 256 / 224 of the size before it cuts, whatever its file says.
    "vjepa2": {"video_processor_type": "LlavaNextVideoVideoProcessor"},
    "ijepa": {"image_processor_type": "BitImageProcessor"},
}
BILINEAR = 2  # of PIL; with antialiasing, as ours


def processor_config(model_type: str, size: int, pixels: dict[str, list[float]]) -> dict[str, Any]:
    """size: pixels; pixels: mean and std of values in [0, 1].

    Square frames come out as in our evaluation to 3e-7. Of others our evaluation cuts the centre before it
    scales, which moves it by up to half a pixel: cut the square first, as the card's snippet does.
    """
    return {
        **PROCESSORS[model_type],
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": BILINEAR,
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": pixels["mean"],
        "image_std": pixels["std"],
    }
