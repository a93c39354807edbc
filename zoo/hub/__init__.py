"""Publishing adapters to the Hugging Face Hub, and getting them from there."""

from zoo.hub.repository import parse_repo_id, publish_to_folder, pull, push

__all__ = ["parse_repo_id", "publish_to_folder", "pull", "push"]
