"""VisBioVisionModel: a small residual network for images of 28 to 64 pixels, a vision model of transformers.

The patches and strides of the usual vision models leave too little of such small images. It is the vision model of
dual encoders (`transformers.VisionTextDualEncoderModel`), and loads by `AutoModel.from_pretrained` once
`visbio_diffusers` is imported.
"""

import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


class VisBioVisionConfig(PreTrainedConfig):
    """Shape of a `VisBioVisionModel`.

    Args:
        num_channels (`int`): of the images: 3 for RGB, 1 for grey.
        image_size (`int`): side in pixels that it was trained with; any other works.
        hidden_sizes (`Sequence[int]`): channels of the stem, at half the side, and of each stage, the first of which
            halves the side again.
        depths (`Sequence[int]`): residual blocks in each stage.
    """

    model_type = "visbio_vision"

    def __init__(self, num_channels=3, image_size=28, hidden_sizes=(64, 128), depths=(2,), **kwargs):
        self.num_channels = num_channels
        self.image_size = image_size
        self.hidden_sizes = list(hidden_sizes)
        self.depths = list(depths)
        self.hidden_size = self.hidden_sizes[-1]
        super().__init__(**kwargs)


class VisBioVisionBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, added to their (pooled, projected) input."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.pool = nn.AvgPool2d(stride, ceil_mode=True)
        self.conv_shortcut = (
            nn.Conv2d(in_channels, out_channels, 1, bias=False) if in_channels != out_channels else None
        )

    def forward(self, hidden_states):
        """Map (B, C, H, W) to (B, C', H / stride, W / stride)."""
        residual = self.pool(hidden_states)
        residual = residual if self.conv_shortcut is None else self.conv_shortcut(residual)
        hidden_states = F.relu(self.norm1(self.conv1(hidden_states)))
        return F.relu(self.norm2(self.conv2(hidden_states)) + residual)


class VisBioVisionModel(PreTrainedModel):
    """A residual network whose pooled output is the mean of its last feature map."""

    config_class = VisBioVisionConfig
    base_model_prefix = "visbio_vision"
    main_input_name = "pixel_values"

    def __init__(self, config):
        super().__init__(config)
        width = config.hidden_sizes[0]
        self.stem = nn.Conv2d(config.num_channels, width, 5, stride=2, padding=2, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        for stage, (channels, depth) in enumerate(zip(config.hidden_sizes[1:], config.depths, strict=True)):
            for place in range(depth):
                blocks.append(VisBioVisionBlock(width, channels, 2 if stage == place == 0 else 1))
                width = channels
        self.blocks = nn.ModuleList(blocks)
        self.post_init()

    def _init_weights(self, module):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values, return_dict=None, **kwargs):
        """Return the last feature map as tokens, and its mean.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].
            return_dict (`bool`, *optional*): a `BaseModelOutputWithPooling` (default), or a tuple.

        Returns:
            `last_hidden_state` of shape `(batch, height / 4 * width / 4, hidden_size)` (rounded up), and
            `pooler_output` of shape `(batch, hidden_size)`.
        """
        hidden_states = F.relu(self.norm(self.stem(pixel_values)))
        for block in self.blocks:
            hidden_states = block(hidden_states)
        tokens = hidden_states.flatten(2).transpose(1, 2)  # (B, N, C)
        pooled = hidden_states.mean(dim=(2, 3))
        if return_dict is False:
            return tokens, pooled
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=pooled)


AutoConfig.register(VisBioVisionConfig.model_type, VisBioVisionConfig)
AutoModel.register(VisBioVisionConfig, VisBioVisionModel)
