"""The model `lavin` for lmms-eval, found by the entry point in pyproject.toml; docs/export.md has the commands."""


def manifest():
    """The entry of lmms-eval's list of models. The model itself is imported where it is run."""
    from lmms_eval.models.registry_v2 import ModelManifest
    return ModelManifest("lavin", simple_class_path=f"{__name__}.model.LaVINModel")
