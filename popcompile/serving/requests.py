"""What a client may ask, field by field; what would change the answer and is not supported is refused by its name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from popcompile.serving.errors import ApiError
from popcompile.serving.sampling import Sampling

#: fields that say nothing about the answer: for OpenAI's accounts, caches and logs
IGNORED = (
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "store", "user",
)  # fmt: skip
#: fields that would change it, and the values that ask for nothing
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
#: of a message, beside its role and content; who speaks is its role's to say
_IGNORED_OF_A_MESSAGE = ("name",)
#: new tokens of /v1/completions where a request does not say, as in OpenAI's
_COMPLETION_TOKENS = 16
_SEED = 2**62


def _are_the_same(value: object, other: object) -> bool:
    """As JSON: 0 is 0.0, and not false."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _require_unicode(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which are no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is not Unicode text (character {error.start + 1})") from None
    return text


Text = Annotated[str, AfterValidator(_require_unicode)]
Stop = Annotated[Text, Field(min_length=1)]
TokenIds = Annotated[list[int], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class ImageURL(_Strict):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _without_empty_fields(cls, data: Any) -> Any:
        """Clients send answers back as they came, with fields of null and empty lists."""
        if not isinstance(data, dict):
            return data
        kept = {k: v for k, v in data.items() if k in ("role", "content")}
        for name in data.keys() - kept.keys() - set(_IGNORED_OF_A_MESSAGE):
            if data[name] not in (None, [], ""):
                raise ApiError(
                    400, f"messages: {name} is not supported; leave it out", "messages", "unsupported_parameter"
                )
        if kept.get("content") is None and kept.get("role") == "assistant":
            kept["content"] = ""
        return kept


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Request(_Strict):
    """What both endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEED, le=_SEED)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _require_supported(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, neutral in UNSUPPORTED.items():
            value = data.get(name)
            if value is not None and not any(_are_the_same(value, n) for n in neutral):
                raise ApiError(400, f"{name} is not supported; leave it out", name, "unsupported_parameter")
        return {name: value for name, value in data.items() if name not in UNSUPPORTED and name not in IGNORED}

    @model_validator(mode="after")
    def _require_stream(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only with stream=true", "stream_options", "invalid_value")
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        """New tokens at most; None: as many as the context has room for."""
        return self.max_tokens

    def samplings(self, new_tokens: int) -> list[Sampling]:
        """How each of the n answers to a prompt is chosen: the first with the seed, the others with those after it.

        new_tokens: at most.
        """
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seeds = [None if self.seed is None else self.seed + i for i in range(self.n or 1)]
        return [Sampling(new_tokens, self.temperature, self.top_p, seed, stop) for seed in seeds]


class ChatRequest(Request):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Request):
    """Of /v1/completions."""

    prompt: Text | TokenIds | Annotated[list[Text] | list[TokenIds], Field(min_length=1)]

    @property
    def limit(self) -> int:
        return _COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt each: a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]
