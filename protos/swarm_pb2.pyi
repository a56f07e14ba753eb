from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[DType]
    DTYPE_FLOAT32: _ClassVar[DType]
    DTYPE_INT32: _ClassVar[DType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_UNSPECIFIED: _ClassVar[Codec]
    CODEC_RAW: _ClassVar[Codec]
    CODEC_BF16: _ClassVar[Codec]
    CODEC_FP16: _ClassVar[Codec]
    CODEC_INT8: _ClassVar[Codec]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_ROWS: _ClassVar[Role]
    ROLE_ROW_INDEX: _ClassVar[Role]
    ROLE_GRADIENTS: _ClassVar[Role]
    ROLE_OUTPUTS: _ClassVar[Role]
    ROLE_ROW_GRADIENTS: _ClassVar[Role]
    ROLE_LENGTHS: _ClassVar[Role]

class Mode(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MODE_UNSPECIFIED: _ClassVar[Mode]
    MODE_TRAIN: _ClassVar[Mode]
    MODE_EVAL: _ClassVar[Mode]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_OK: _ClassVar[Outcome]
    OUTCOME_DECLINED: _ClassVar[Outcome]
    OUTCOME_UNKNOWN_EXPERT: _ClassVar[Outcome]
    OUTCOME_STALE: _ClassVar[Outcome]
    OUTCOME_MISSING_INPUTS: _ClassVar[Outcome]
    OUTCOME_ALREADY_APPLIED: _ClassVar[Outcome]
    OUTCOME_NON_FINITE: _ClassVar[Outcome]
DTYPE_UNSPECIFIED: DType
DTYPE_FLOAT32: DType
DTYPE_INT32: DType
CODEC_UNSPECIFIED: Codec
CODEC_RAW: Codec
CODEC_BF16: Codec
CODEC_FP16: Codec
CODEC_INT8: Codec
ROLE_UNSPECIFIED: Role
ROLE_ROWS: Role
ROLE_ROW_INDEX: Role
ROLE_GRADIENTS: Role
ROLE_OUTPUTS: Role
ROLE_ROW_GRADIENTS: Role
ROLE_LENGTHS: Role
MODE_UNSPECIFIED: Mode
MODE_TRAIN: Mode
MODE_EVAL: Mode
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_OK: Outcome
OUTCOME_DECLINED: Outcome
OUTCOME_UNKNOWN_EXPERT: Outcome
OUTCOME_STALE: Outcome
OUTCOME_MISSING_INPUTS: Outcome
OUTCOME_ALREADY_APPLIED: Outcome
OUTCOME_NON_FINITE: Outcome

class InfoRequest(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class InfoReply(_message.Message):
    __slots__ = ("public_key", "signature", "software_version", "signed_manifest", "dht_addresses")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SIGNED_MANIFEST_FIELD_NUMBER: _ClassVar[int]
    DHT_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    signature: bytes
    software_version: str
    signed_manifest: bytes
    dht_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., software_version: _Optional[str] = ..., signed_manifest: _Optional[bytes] = ..., dht_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class SignedManifest(_message.Message):
    __slots__ = ("manifest_json", "signature")
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    manifest_json: bytes
    signature: bytes
    def __init__(self, manifest_json: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class CallCredential(_message.Message):
    __slots__ = ("public_key", "server_public_key", "certificate_sha256", "expires_at_unix_s", "nonce", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SERVER_PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_SHA256_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    server_public_key: bytes
    certificate_sha256: bytes
    expires_at_unix_s: int
    nonce: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., server_public_key: _Optional[bytes] = ..., certificate_sha256: _Optional[bytes] = ..., expires_at_unix_s: _Optional[int] = ..., nonce: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class SignedRecord(_message.Message):
    __slots__ = ("public_key", "kind", "run_id", "expires_at_unix_s", "body_json", "signature")
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    BODY_JSON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    public_key: bytes
    kind: str
    run_id: str
    expires_at_unix_s: float
    body_json: bytes
    signature: bytes
    def __init__(self, public_key: _Optional[bytes] = ..., kind: _Optional[str] = ..., run_id: _Optional[str] = ..., expires_at_unix_s: _Optional[float] = ..., body_json: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class TensorHeader(_message.Message):
    __slots__ = ("role", "dtype", "codec", "shape", "size_bytes")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    role: Role
    dtype: DType
    codec: Codec
    shape: _containers.RepeatedScalarFieldContainer[int]
    size_bytes: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., dtype: _Optional[_Union[DType, str]] = ..., codec: _Optional[_Union[Codec, str]] = ..., shape: _Optional[_Iterable[int]] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class ExpertRows(_message.Message):
    __slots__ = ("index", "num_rows", "version")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    index: int
    num_rows: int
    version: int
    def __init__(self, index: _Optional[int] = ..., num_rows: _Optional[int] = ..., version: _Optional[int] = ...) -> None: ...

class CallHeader(_message.Message):
    __slots__ = ("call_id", "run_id", "mode", "layer", "experts", "reply_codec", "timeout_ms", "loss_tokens", "tensors", "score")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    REPLY_CODEC_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    LOSS_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    call_id: bytes
    run_id: str
    mode: Mode
    layer: int
    experts: _containers.RepeatedCompositeFieldContainer[ExpertRows]
    reply_codec: Codec
    timeout_ms: int
    loss_tokens: float
    tensors: _containers.RepeatedCompositeFieldContainer[TensorHeader]
    score: float
    def __init__(self, call_id: _Optional[bytes] = ..., run_id: _Optional[str] = ..., mode: _Optional[_Union[Mode, str]] = ..., layer: _Optional[int] = ..., experts: _Optional[_Iterable[_Union[ExpertRows, _Mapping]]] = ..., reply_codec: _Optional[_Union[Codec, str]] = ..., timeout_ms: _Optional[int] = ..., loss_tokens: _Optional[float] = ..., tensors: _Optional[_Iterable[_Union[TensorHeader, _Mapping]]] = ..., score: _Optional[float] = ...) -> None: ...

class ProbeHeader(_message.Message):
    __slots__ = ("reply_bytes",)
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    reply_bytes: int
    def __init__(self, reply_bytes: _Optional[int] = ...) -> None: ...

class CallFrame(_message.Message):
    __slots__ = ("header", "chunk", "probe")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    header: CallHeader
    chunk: bytes
    probe: ProbeHeader
    def __init__(self, header: _Optional[_Union[CallHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ..., probe: _Optional[_Union[ProbeHeader, _Mapping]] = ...) -> None: ...

class ExpertOutcome(_message.Message):
    __slots__ = ("index", "outcome", "version")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    index: int
    outcome: Outcome
    version: int
    def __init__(self, index: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., version: _Optional[int] = ...) -> None: ...

class GroupReply(_message.Message):
    __slots__ = ("experts", "tensor")
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertOutcome]
    tensor: TensorHeader
    def __init__(self, experts: _Optional[_Iterable[_Union[ExpertOutcome, _Mapping]]] = ..., tensor: _Optional[_Union[TensorHeader, _Mapping]] = ...) -> None: ...

class CallEnd(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ReplyFrame(_message.Message):
    __slots__ = ("group", "chunk", "end")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    group: GroupReply
    chunk: bytes
    end: CallEnd
    def __init__(self, group: _Optional[_Union[GroupReply, _Mapping]] = ..., chunk: _Optional[bytes] = ..., end: _Optional[_Union[CallEnd, _Mapping]] = ...) -> None: ...
