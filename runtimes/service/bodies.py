"""Bodies of requests and of answers; what is not known in a request is ignored, as the peers do."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _unicode(text: str) -> str:
    """JSON can write halves of surrogate pairs, which are no characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it is not Unicode: half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_unicode)]

TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Input = Text | Tokens
Inputs = Input | list[Input]


class Body(BaseModel):
    """A request; ``model`` names a bundle."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    model: Text | None = None


class Truncated(Body):
    """A request of text-embeddings-inference whose inputs may be cut."""

    truncate: bool | None = None
    truncation_direction: Literal["Right", "right", "Left", "left"] = "Right"


class Prompted(Truncated):
    """With a prompt."""

    prompt_name: Text | None = None


class EmbedBody(Prompted):
    """`/embed`."""

    inputs: Inputs
    normalize: bool = True
    dimensions: Annotated[int, Field(ge=1)] | None = None


class EmbedAllBody(Prompted):
    """`/embed_all` and `/embed_sparse`."""

    inputs: Inputs


class PredictBody(Truncated):
    """`/predict`: a text, a pair, or a batch of lists of one or two texts."""

    inputs: Text | list[Text] | list[list[Text]]
    raw_scores: bool = False


class RerankBody(Truncated):
    """`/rerank`: with ``texts`` as text-embeddings-inference, with ``documents`` as Cohere."""

    query: Text
    texts: list[Text] | None = None
    raw_scores: bool = False
    return_text: bool = False
    documents: list[Text] | None = None
    return_documents: bool = False
    top_n: Annotated[int, Field(ge=1)] | None = None


class SimilarityInputs(BaseModel):
    """A sentence and those to compare it with."""

    model_config = ConfigDict(strict=True)
    source_sentence: Text
    sentences: list[Text]


class SimilarityParameters(BaseModel):
    """Options of `/similarity`."""

    model_config = ConfigDict(strict=True)
    truncate: bool | None = None
    truncation_direction: Literal["Right", "right", "Left", "left"] = "Right"
    prompt_name: Text | None = None


class SimilarityBody(Body):
    """`/similarity`."""

    inputs: SimilarityInputs
    parameters: SimilarityParameters | None = None


class TokenizeBody(Body):
    """`/tokenize`."""

    inputs: Text | list[Text]
    add_special_tokens: bool = True
    prompt_name: Text | None = None


class DecodeBody(Body):
    """`/decode`."""

    ids: list[TokenId] | list[list[TokenId]]
    skip_special_tokens: bool = True


Strategy = Literal["none", "simple", "first", "average", "max"]
Threshold = Annotated[float, Field(ge=0, le=1)]


class NerParameters(BaseModel):
    """Options of `/ner`, in the body or, as the pipeline's clients send them, in ``parameters``."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    aggregation_strategy: Strategy | None = None
    threshold: Threshold | None = None
    labels: list[Text] | None = None
    ignore_labels: list[Text] | None = None


class NerBody(Body, NerParameters):
    """`/ner`."""

    inputs: Text | list[Text]
    parameters: NerParameters | None = None


class AnalyzeBody(Truncated):
    """`/analyze`."""

    inputs: Text | list[Text]
    heads: list[Text] | None = None
    aggregation_strategy: Strategy = "first"
    threshold: Threshold = 0.0


class SearchBody(Body):
    """`/search`."""

    query: Text | list[Text]
    k: Annotated[int, Field(ge=1, le=1000)] = 10
    truncate: bool | None = None


class OpenAIBody(Body):
    """`/v1/embeddings`."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Text | None = None


class TeiError(BaseModel):
    """An error of text-embeddings-inference."""

    error: str
    error_type: str


class OpenAIErrorDetail(BaseModel):
    """What an error of OpenAI says."""

    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """An error of OpenAI."""

    error: OpenAIErrorDetail


def errors(model: type[BaseModel], *statuses: int) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route's errors."""
    common = (400, 401, 404, 408, 413, 424, 429, 503)
    return {status: {"model": model} for status in (*common, *statuses)}


TEI_ERRORS = errors(TeiError, 422)
OPENAI_ERRORS = errors(OpenAIError, 422)
