"""The hooks by which Diffusers finds our classes under the short name "visbio_diffusers", and nothing else.

They are private API of Diffusers, which is why pyproject.toml bounds its version. With them `model_index.json` holds
`["visbio_diffusers", "VisBioUNet"]`, and `DiffusionPipeline.from_pretrained` and `diffusers.AutoModel` load our
folders and Hub repos without `trust_remote_code`, Diffusers' auto pipelines find ours for each task, and the caches
that skip transformer blocks know our blocks.
"""

import sys

import diffusers
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.pipelines import pipeline_loading_utils


LIBRARY = "visbio_diffusers"
SAVE_AND_LOAD = ["save_pretrained", "from_pretrained"]


def register(package, classes):
    """Make `classes` of `package` loadable by Diffusers.

    Args:
        package (`module`): this package, with the classes as attributes.
        classes (`Sequence[type]`): models and pipelines.
    """
    loadable = {base: SAVE_AND_LOAD for base in ("ModelMixin", "DiffusionPipeline", *(c.__name__ for c in classes))}
    pipeline_loading_utils.LOADABLE_CLASSES[LIBRARY] = loadable
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(loadable)
    setattr(diffusers.pipelines, LIBRARY, package)
    for each in classes:
        setattr(diffusers, each.__name__, each)
        setattr(diffusers.pipelines, each.__name__, each)
    _add_auto_pipelines(package)
    block = package.models.attention_visbio.VisBioTransformerBlock
    TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0))


def _add_auto_pipelines(package):
    """Add ours to Diffusers' auto pipelines, once they are imported: that takes half a second, so not before."""

    def add(module):
        module.AUTO_TEXT2IMAGE_PIPELINES_MAPPING["visbio"] = package.VisBioPipeline
        module.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING["visbio"] = package.VisBioImg2ImgPipeline
        module.AUTO_INPAINT_PIPELINES_MAPPING["visbio"] = package.VisBioInpaintPipeline

    loaded = sys.modules.get("diffusers.pipelines.auto_pipeline")
    if loaded is not None:
        add(loaded)
        return
    get_module = diffusers.pipelines._get_module

    def get(name):
        module = get_module(name)
        if name == "auto_pipeline":
            add(module)
        return module

    diffusers.pipelines._get_module = get
