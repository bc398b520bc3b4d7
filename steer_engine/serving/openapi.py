"""The `steering` field in the OpenAPI page of vLLM's own endpoints."""

from __future__ import annotations

from typing import Any

from steer_engine.spec import SteeringSpec

REQUESTS = (
    "ChatCompletionRequest",
    "BatchChatCompletionRequest",
    "CompletionRequest",
    "ResponsesRequest",
    "AnthropicMessagesRequest",
    "GenerateRequest",
)


def document_field(app: Any) -> None:
    """Make `app.openapi()` describe the field on every request that carries it."""
    original = app.openapi

    def openapi() -> dict[str, Any]:
        page: dict[str, Any] = original()
        schemas = page.setdefault("components", {}).setdefault("schemas", {})
        spec = SteeringSpec.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(spec.pop("$defs", {}))
        schemas["SteeringSpec"] = spec
        field = {
            "anyOf": [{"$ref": "#/components/schemas/SteeringSpec"}, {"const": False}, {"type": "null"}],
            "description": "Steer this request; false: not even by the server's default preset.",
        }
        for name in REQUESTS:
            if name in schemas:
                schemas[name].setdefault("properties", {})["steering"] = field
        return page

    app.openapi = openapi
