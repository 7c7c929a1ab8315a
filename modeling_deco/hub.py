# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""DeCo checkpoints on the Hub: the code for `trust_remote_code=True`, the model card, and the upload.

This file is part of that code. The other files of the model import it, so it imports none of them and uses only the
properties of a config.
"""

import shutil
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, hf_hub_download, is_offline_mode
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

# With these entries and files, a saved folder works with `trust_remote_code=True` and without this package.
# transformers alone writes only the entry of the class that is saved.
AUTO_MAP = {
    "AutoConfig": "configuration_deco.DecoConfig",
    "AutoModel": "modeling_deco.DecoModel",
    "AutoModelForImageTextToText": "modeling_deco.DecoForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_deco.DecoForConditionalGeneration",
    "AutoProcessor": "processing_deco.DecoProcessor",
}
_REMOTE_CODE_FILES = (
    "chat_templates.py",
    "configuration_deco.py",
    "feature_maps.py",
    "hub.py",
    "llava.py",
    "modeling_deco.py",
    "pixels.py",
    "positions.py",
    "processing_deco.py",
    "projectors.py",
    "videos.py",
    "views.py",
)

_USAGE = """\
```python
import modeling_deco  # or pass trust_remote_code=True
from transformers import pipeline

pipe = pipeline("image-text-to-text", model="{model_id}")
content = [{{"type": "image", "image": "photo.jpg"}}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": content}}]
pipe(text=messages, return_full_text=False)
{other_grid}```"""


def copy_remote_code(save_directory) -> None:
    """Copy the modules of `AUTO_MAP`, and those that they import, into a checkpoint's folder.

    If this code was itself loaded from such a folder, only the modules that transformers has fetched are copied.
    """
    for name in _REMOTE_CODE_FILES:
        source = Path(__file__).with_name(name)
        target = Path(save_directory, name)
        if source.exists() and not (target.exists() and source.samefile(target)):
            shutil.copyfile(source, target)


def model_card(config, title: str, model_id: str, about: str = "", **metadata) -> ModelCard:
    """The model card of a checkpoint.

    Args:
        config: the checkpoint's `DecoConfig`.
        title: the card's title.
        model_id: folder or Hub id, for the example.
        about: paragraphs that come before the example.
        metadata: fields of `ModelCardData`, which replace those set here. A card without `pipeline_tag` has no
            example.
    """
    fields = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["deco", "llava", "vision-language", "token-compression"],
    }
    data = ModelCardData(**{**fields, **metadata})
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"A [DeCo](https://arxiv.org/abs/2405.20985) vision-language model: vision tower "
        f"`{config.vision_config.model_type}`, language model `{config.text_config.model_type}`. {_tokens(config)}",
    ]
    if about:
        paragraphs.append(about)
    if data.pipeline_tag is not None:
        grid = f'processor_kwargs={{"pooled_grid_size": {min(config.patch_grid)}}}'
        other = f"pipe(text=messages, return_full_text=False, {grid})\n" if config.takes_any_grid else ""
        paragraphs.append(_USAGE.format(model_id=model_id, other_grid=other))
    return ModelCard("\n\n".join(paragraphs) + "\n")


def _tokens(config) -> str:
    """What the card says of the tokens of images and videos."""
    (rows, cols), (pooled_rows, pooled_cols) = config.patch_grid, config.pooled_grid
    has_views = config.image_grid_pinpoints is not None
    patches = f"{'view' if has_views else 'image'}'s {rows} x {cols} patches"
    if config.projector_type == "mlp":
        sentences = [f"Each of {'a' if has_views else 'an'} {patches} becomes one token."]
    else:
        pooling = "2D average pooling, which has no parameters,"
        how = pooling if config.projector_type == "avg_pool" else f"the projector `{config.projector_type}`"
        any_grid = "; any other grid can be chosen per call" if config.takes_any_grid else ""
        sentences = [
            f"{'A' if has_views else 'An'} {patches} are shrunk by {how} to {pooled_rows} x {pooled_cols} = "
            f"{config.num_image_tokens} tokens{any_grid}."
        ]
    if has_views:
        sizes = config.image_grid_pinpoints
        images = [config.views.image_maps((height, width), config.pooled_grid) for height, width in sizes]
        most_tokens = max(sum(token_map.num_tokens for token_map in maps) for maps in images)
        most_tiles = max(maps[-1].num_views for maps in images)
        overview = "an overview and " if config.image_overview else ""
        sentences.append(
            f"An image is seen as {overview}up to {most_tiles} tiles. The patches of the tiles are one map, which is "
            f"pooled by the same factor. These are up to {most_tokens} tokens."
        )
    if config.video_token_id is not None:
        (rows, cols), number = config.pooled_video_grid, config.frames_per_token_grid
        frames = "Each frame of a video becomes" if number == 1 else f"Every {number} frames of a video become"
        sentences.append(f"{frames} {rows} x {cols} = {rows * cols} tokens.")
    return " ".join(sentences)


def base_models(config, repo_id: str | None = None) -> list[str]:
    """Hub ids of the models that a model was made from: the one that was loaded, or else its two backbones. Local
    folders and `repo_id` itself are left out."""

    def is_on_hub(name):
        try:
            validate_repo_id(name)
        except HFValidationError:
            return False
        # a name without an owner may be the name of a folder elsewhere
        return "/" in name and name != repo_id and not Path(name).exists()

    backbones = (config.vision_config.name_or_path, config.text_config.name_or_path)
    for names in ((config.name_or_path,), backbones):
        if known := [name for name in names if is_on_hub(name)]:
            return list(dict.fromkeys(known))
    return []


def load_card(repo_id: str, token: str | bool | None = None, revision: str | None = None) -> ModelCard | None:
    """The model card of a repository on the Hub, None if it has none. For a revision that does not exist yet, the card
    of `main`, from which the revision will be created."""
    try:
        return ModelCard.load(hf_hub_download(repo_id, "README.md", revision=revision, token=token))
    except RevisionNotFoundError:
        if revision is None:
            raise
        return load_card(repo_id, token)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not is_offline_mode():
            raise  # the network failed: there may be a card, and it must not be replaced
        return None


def files_of(folder) -> dict[str, int]:
    """Names of all files in a folder and its subfolders, with their modification times in nanoseconds."""
    paths = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in paths}


def upload(
    folder,
    repo_id: str,
    card=None,
    unchanged: dict[str, int] | None = None,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    tags: list[str] | str | None = None,
    metadata: dict | None = None,
    **commit,
):
    """Upload the files that a config, processor or model has saved in a folder, in one commit.

    A `README.md` in the folder becomes the card of a repository that has none. A repository's own card is kept; `tags`
    and `metadata` are added to it unless the folder has a card too.

    Args:
        folder: the folder.
        repo_id: id of the repository, which is created if it does not exist.
        card: a function that makes a card from the repository's id and metadata, if neither side has one.
        unchanged: `files_of(folder)` before saving. Files that were not written since are not uploaded.
        private, token, tags: see `PreTrainedModel.push_to_hub`.
        metadata: fields of the card: `license`, `language`, `datasets`, `widget`, ...
        commit: `commit_message`, `commit_description`, `revision`, `create_pr`.

    Returns:
        The `CommitInfo`.
    """
    repo_id = HfApi().create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    readme, unchanged, metadata = Path(folder, "README.md"), dict(unchanged or {}), dict(metadata or {})
    tags = [tags] if isinstance(tags, str) else list(tags or [])
    on_hub = load_card(repo_id, token, commit.get("revision"))
    if on_hub is None:
        unchanged.pop(readme.name, None)  # the folder's own goes along
        if card is not None and not readme.exists():
            new = card(repo_id, **metadata)
            new.data.tags = list(dict.fromkeys([*(new.data.tags or []), *tags]))
            new.save(readme)
    elif (tags or metadata) and not readme.exists():
        for field, value in metadata.items():
            on_hub.data[field] = value
        if tags:
            on_hub.data.tags = list(dict.fromkeys([*(on_hub.data.tags or []), *tags]))
        on_hub.save(readme)
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(Path(folder, name)))
        for name, written in files_of(folder).items()
        if unchanged.get(name) != written
    ]
    revision = commit.get("revision")
    if revision is not None and not revision.startswith("refs/pr/"):
        try:
            HfApi().create_branch(repo_id=repo_id, branch=revision, token=token, exist_ok=True)
        except HfHubHTTPError:
            if not commit.get("create_pr"):  # a pull request needs no right to create the branch
                raise
    commit.setdefault("commit_message", "Upload DeCo")
    return HfApi().create_commit(repo_id=repo_id, operations=operations, token=token, **commit)
