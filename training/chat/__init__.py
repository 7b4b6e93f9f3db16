"""Chat models that answer one message at a time, behind an endpoint or in this process: teachers and judges."""

from icae_fast.training.chat.endpoint import EndpointModel
from icae_fast.training.chat.model import ChatModel, RequestFailed

__all__ = ["ChatModel", "EndpointModel", "RequestFailed"]
