"""Input is declared: what a file must hold is a schema, a type that pydantic checks before anything slow.

A schema is a TypedDict with `@declared`, or a dict or list of other types. Errors take one line, which names the file,
the record, the field and the fix.
"""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, PlainValidator, TypeAdapter, ValidationError, with_config

from lavin.runtime.errors import UserError
from lavin.runtime.files import PUT_IT_THERE, WRITE_IT_AGAIN, load_json

T = TypeVar("T")

MAX_SHOWN = 120  # characters of a wrong value or key that an error shows: names of tensors are long

# For a TypedDict: numbers are finite, and entries that it does not declare are kept, or refused.
declared = with_config(ConfigDict(extra="allow", allow_inf_nan=False))
strictly_declared = with_config(ConfigDict(extra="forbid", allow_inf_nan=False))


# --- Types of fields ---

def encodable(text: str) -> str:
    """JSON can spell half a character ("\\ud800"), which no tokenizer, file or terminal takes."""
    text.encode()  # UnicodeEncodeError is a ValueError
    return text


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty")
    return text


def path_text(text: Any) -> str:
    """A path may hold bytes that are no UTF-8, which Python reads as half characters and pydantic would refuse."""
    if not isinstance(text, str) or "\0" in text:
        raise ValueError(f"{shown(text)} names no file or folder")
    return text


def names_a_file(text: Any) -> str:
    if not path_text(text).strip():
        raise ValueError(f"{shown(text)} names no file or folder")
    return text


def is_plain_name(text: str) -> bool:
    """Whether the name of a file or folder cannot lead out of its folder."""
    return bool(text.strip()) and text.isprintable() and not set(text) & set("/\\") and text not in (".", "..")


def plain_name(text: str) -> str:
    if not is_plain_name(text):
        raise ValueError(f"is no plain name of a file or folder: {shown(text)}")
    return text


def distinct(texts: list[str]) -> list[str]:
    seen = set()
    for text in texts:
        if text.strip() in seen:
            raise ValueError(f"has {shown(text)} twice")
        seen.add(text.strip())
    return texts


Text = Annotated[str, AfterValidator(encodable)]
NonBlankText = Annotated[Text, AfterValidator(not_blank)]
PlainName = Annotated[Text, AfterValidator(plain_name)]
PathText = Annotated[str, PlainValidator(path_text)]  # may be empty
FileName = Annotated[str, PlainValidator(names_a_file)]
Size = Annotated[int, Field(ge=1, le=2**24)]  # of a tensor: larger ones overflow before they fail
Width = Annotated[int, Field(ge=1, le=2**16)]
Layers = Annotated[int, Field(ge=1, le=1024)]
Count = Annotated[int, Field(ge=1, le=10**6)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # of torch's generators
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Factor = Annotated[float, Field(gt=0, le=1e6)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]


# --- Checking ---

@cache
def adapter(schema: Any) -> TypeAdapter:
    return TypeAdapter(schema)


def validate(value: Any, schema: type[T], source: str, hint: str = WRITE_IT_AGAIN) -> T:
    """The value, checked; no type is converted, except int to float.

    Raises UserError `SOURCE: FIELD: what is wrong (and N more): HINT`.
    """
    try:
        return adapter(schema).validate_python(value, strict=True)  # type: ignore[arg-type]  # types have hashes
    except ValidationError as error:
        first, *others = error.errors(include_url=False)
        where = ": ".join(filter(None, (source, field_name(first["loc"]))))
        more = f" (and {len(others)} more)" if others else ""
        raise UserError(f"{where}: {what_is_wrong(first)}{more}: {hint}") from error


def field_name(location: tuple) -> str:
    """`("model", "norm", 3)` -> `model.norm[3]`."""
    parts = [f"[{part}]" if isinstance(part, int) else f".{shown(part, quoted=False)}" for part in location
             if part != "[key]"]  # pydantic's mark for a wrong key
    return "".join(parts).removeprefix(".")


def what_is_wrong(error: Any) -> str:
    """Pydantic's message without its subject. Its own checks concern the value, which is shown; ours say all."""
    if error["type"] in ("missing", "extra_forbidden"):
        return "is missing" if error["type"] == "missing" else "is unknown to this version of LaVIN"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    predicate = message[message.find("should"):] if "should" in message else message
    return predicate if ", not " in predicate else f"{predicate}, not {shown(error['input'])}"


def shown(value: Any, quoted: bool = True) -> str:
    """A plain value, shortened, on one line; of others, the type."""
    if not isinstance(value, str | int | float | None):
        return f"a {type(value).__name__}"
    try:
        text = value if isinstance(value, str) and not quoted and value.isprintable() else repr(value)
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a huge number"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


# --- JSON ---

def read_validated(path: str | Path, schema: type[T], hint: str = PUT_IT_THERE, fix: str = WRITE_IT_AGAIN) -> T:
    """The content of a JSON file, checked. Raises UserError, which ends in `hint` where the file cannot be read, and in
    `fix` where its content is not as declared.
    """
    return validate(load_json(path, hint, fix), schema, str(path), fix)
