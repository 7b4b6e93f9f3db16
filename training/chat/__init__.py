"""Chat models that answer one message at a time, behind an endpoint or in this process: teachers and judges.

`EndpointModel` needs httpx, which comes with huggingface_hub.
"""

from icae_fast.training.chat.endpoint import EndpointModel
from icae_fast.training.chat.model import ChatModel, RequestFailed

__all__ = ["ChatModel", "EndpointModel", "RequestFailed"]
