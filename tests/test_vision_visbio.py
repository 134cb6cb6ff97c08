"""VisBioVisionModel: shapes, saving and loading by transformers' Auto classes, and its place in a dual encoder."""

import torch
from transformers import AutoModel, BertConfig, BertModel, VisionTextDualEncoderModel

from visbio_diffusers import VisBioVisionModel
from visbio_diffusers.models.vision_visbio import VisBioVisionConfig


def make(**shape):
    torch.manual_seed(0)
    return VisBioVisionModel(VisBioVisionConfig(hidden_sizes=[8, 16, 24], depths=[2, 1], **shape)).eval()


def test_any_size_gives_a_quarter_of_the_side_in_tokens():
    for channels, side, tokens in ((3, 28, 49), (1, 64, 256), (3, 30, 64)):
        out = make(num_channels=channels)(torch.randn(2, channels, side, side))
        assert out.last_hidden_state.shape == (2, tokens, 24) and out.pooler_output.shape == (2, 24)
        torch.testing.assert_close(out.last_hidden_state.mean(dim=1), out.pooler_output)


def test_auto_classes_load_what_was_saved(tmp_path):
    model, pixel_values = make(), torch.randn(2, 3, 28, 28)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert type(loaded) is VisBioVisionModel and loaded.config.hidden_sizes == [8, 16, 24]
    torch.testing.assert_close(loaded(pixel_values)[1], model(pixel_values, return_dict=False)[1], rtol=0, atol=0)


def test_dual_encoder_takes_it_and_loads_again(tmp_path):
    text = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    model = VisionTextDualEncoderModel(vision_model=make(), text_model=BertModel(text)).eval()
    model.train().vision_model(3 + 2 * torch.randn(4, 3, 28, 28))  # running means and variances are weights too
    model.eval().save_pretrained(tmp_path)
    loaded = VisionTextDualEncoderModel.from_pretrained(tmp_path).eval()
    inputs = {"input_ids": torch.tensor([[1, 2, 3]]), "pixel_values": torch.randn(2, 3, 28, 28)}
    torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
