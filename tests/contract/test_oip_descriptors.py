"""Our Open Inference Protocol against the one in tritonclient, field by field, in both directions."""

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType

import pytest
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from tritonclient.grpc import model_config_pb2 as their_config
from tritonclient.grpc import service_pb2 as their_service

from penstock.oip import inference_pb2, model_config_pb2

# Triton's configurations nest at most as deep; the limit is there to name the test if one ever nests in itself.
MAX_DEPTH = 12

OUR_FILES = (inference_pb2, model_config_pb2)
THEIR_FILES = (their_service, their_config)


def messages(modules: tuple[ModuleType, ...]) -> dict[str, Descriptor]:
    """Every message by its full name, those within others too; maps have one for their entries."""

    def below(descriptors: Mapping[str, Descriptor]) -> Iterator[Descriptor]:
        for descriptor in descriptors.values():
            yield descriptor
            yield from below(descriptor.nested_types_by_name)

    return {found.full_name: found for module in modules for found in below(module.DESCRIPTOR.message_types_by_name)}


def enums(modules: tuple[ModuleType, ...]) -> dict[str, EnumDescriptor]:
    found = [enum for module in modules for enum in module.DESCRIPTOR.enum_types_by_name.values()]
    found += [enum for message in messages(modules).values() for enum in message.enum_types]
    return {enum.full_name: enum for enum in found}


def rpcs(module: ModuleType) -> dict[str, MethodDescriptor]:
    return dict(module.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name)


OURS, THEIRS = messages(OUR_FILES), messages(THEIR_FILES)
OUR_ENUMS, THEIR_ENUMS = enums(OUR_FILES), enums(THEIR_FILES)
FIELDS = sorted(
    {(name, field.number) for names in (OURS, THEIRS) for name, message in names.items() for field in message.fields}
)


def described(messages_by_name: Mapping[str, Descriptor], message: str, number: int) -> dict[str, object] | None:
    """All that the wire, JSON and the text form know of a field; None where there is no such field."""
    descriptor = messages_by_name.get(message)
    field = descriptor.fields_by_number.get(number) if descriptor else None
    if field is None:
        return None
    return {
        "name": field.name,
        "json": field.json_name,
        "type": field.type,
        "repeated": field.is_repeated,
        "required": field.is_required,
        "packed": field.is_packed,
        "presence": field.has_presence,
        "map": is_map(field),
        "message": field.message_type.full_name if field.message_type else None,
        "enum": field.enum_type.full_name if field.enum_type else None,
        "oneof": field.containing_oneof.name if field.containing_oneof else None,
    }


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def test_they_are_two_protocols() -> None:
    """Else everything below would compare tritonclient with itself."""
    for name, ours in OURS.items():
        assert ours is not THEIRS.get(name)
        assert ours.file.pool is not THEIRS[name].file.pool


def test_messages() -> None:
    assert sorted(OURS) == sorted(THEIRS)


@pytest.mark.parametrize(("message", "number"), FIELDS)
def test_field(message: str, number: int) -> None:
    assert described(OURS, message, number) == described(THEIRS, message, number)


@pytest.mark.parametrize("message", sorted(OURS | THEIRS))
def test_oneofs(message: str) -> None:
    def of(descriptor: Descriptor) -> dict[str, set[str]]:
        return {oneof.name: {field.name for field in oneof.fields} for oneof in descriptor.oneofs}

    assert of(OURS[message]) == of(THEIRS[message])


def test_enums() -> None:
    assert sorted(OUR_ENUMS) == sorted(THEIR_ENUMS)


@pytest.mark.parametrize("enum", sorted(OUR_ENUMS | THEIR_ENUMS))
def test_enum_values(enum: str) -> None:
    def of(descriptor: EnumDescriptor) -> list[tuple[str, int]]:
        return [(value.name, value.number) for value in descriptor.values]

    assert of(OUR_ENUMS[enum]) == of(THEIR_ENUMS[enum])


def test_service() -> None:
    ours, theirs = inference_pb2.DESCRIPTOR, their_service.DESCRIPTOR
    assert ours.package == theirs.package == "inference"
    assert list(ours.services_by_name) == list(theirs.services_by_name) == ["GRPCInferenceService"]
    assert sorted(rpcs(inference_pb2)) == sorted(rpcs(their_service))
    assert len(rpcs(inference_pb2)) == 20


@pytest.mark.parametrize("name", sorted(rpcs(inference_pb2) | rpcs(their_service)))
def test_rpc(name: str) -> None:
    def of(method: MethodDescriptor) -> tuple[str, str, bool, bool]:
        types = method.input_type.full_name, method.output_type.full_name
        return (*types, method.client_streaming, method.server_streaming)

    assert of(rpcs(inference_pb2)[name]) == of(rpcs(their_service)[name])


SCALARS: dict[int, Callable[[int], object]] = {
    FieldDescriptor.CPPTYPE_BOOL: lambda _: True,
    FieldDescriptor.CPPTYPE_INT32: lambda seed: -(2**31) + seed,
    FieldDescriptor.CPPTYPE_INT64: lambda seed: -(2**63) + seed,
    FieldDescriptor.CPPTYPE_UINT32: lambda seed: 2**32 - 1 - seed,
    FieldDescriptor.CPPTYPE_UINT64: lambda seed: 2**64 - 1 - seed,
    FieldDescriptor.CPPTYPE_FLOAT: lambda seed: seed + 0.25,
    FieldDescriptor.CPPTYPE_DOUBLE: lambda seed: seed + 0.1,
}


def scalar(field: FieldDescriptor, seed: int) -> object:
    """A value that is not the field's default, and differs from the neighbours'."""
    if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
        return field.enum_type.values[-1].number
    if field.cpp_type == FieldDescriptor.CPPTYPE_STRING:
        text = f"größe {seed}"
        return text.encode() + b"\xff\0" if field.type == FieldDescriptor.TYPE_BYTES else text
    return SCALARS[field.cpp_type](seed)


def fill(message: Message, choice: int, depth: int = 0) -> None:
    """Sets every field, and of each oneof the `choice`-th, or its last."""
    assert depth < MAX_DEPTH, f"{message.DESCRIPTOR.full_name} nests too deep"
    for field in message.DESCRIPTOR.fields:
        oneof = field.containing_oneof
        if oneof is not None and field is not oneof.fields[min(choice, len(oneof.fields) - 1)]:
            continue
        value = getattr(message, field.name)
        if is_map(field):
            fill_map(value, field, choice, depth)
        elif field.message_type is not None:
            for one in (value.add(), value.add()) if field.is_repeated else (value,):
                one.SetInParent()
                fill(one, choice, depth + 1)
        elif field.is_repeated:
            value.extend([scalar(field, field.number), scalar(field, field.number + 1)])
        else:
            setattr(message, field.name, scalar(field, field.number))


def fill_map(entries: dict[object, object], field: FieldDescriptor, choice: int, depth: int) -> None:
    key, value = (field.message_type.fields_by_name[name] for name in ("key", "value"))
    for seed in (field.number, field.number + 1):
        if value.message_type is None:
            entries[scalar(key, seed)] = scalar(value, seed)
        else:
            one = entries[scalar(key, seed)]
            assert isinstance(one, Message)
            one.SetInParent()
            fill(one, choice, depth + 1)


def choices(message: Descriptor, known: frozenset[str] = frozenset()) -> int:
    """The most fields that a oneof in the message, or in one below it, has."""
    here = [len(oneof.fields) for oneof in message.oneofs]
    inner = (field.message_type for field in message.fields if field.message_type is not None)
    known |= {message.full_name}
    return max([1, *here, *(choices(one, known) for one in inner if one.full_name not in known)])


def knows_all(message: Message) -> bool:
    """Whether a parsed message, and those within it, have no unknown fields."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    return known.ByteSize() == message.ByteSize()


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        (name, choice)
        for name, message in sorted(THEIRS.items())
        if not message.GetOptions().map_entry
        for choice in range(choices(message))
    ],
)
def test_what_they_write_we_read_and_write_the_same(name: str, choice: int) -> None:
    theirs = GetMessageClass(THEIRS[name])()
    fill(theirs, choice)
    # The order of a map's entries is only fixed where it is asked for.
    content = theirs.SerializeToString(deterministic=True)
    ours = GetMessageClass(OURS[name]).FromString(content)
    assert knows_all(ours)
    assert ours.SerializeToString(deterministic=True) == content
    filled = GetMessageClass(OURS[name])()
    fill(filled, choice)
    assert filled == ours
