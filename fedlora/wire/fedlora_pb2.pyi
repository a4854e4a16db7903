from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClientFrame(_message.Message):
    __slots__ = ("join", "ready", "upload", "end", "declined", "leave", "sum", "chunk")
    JOIN_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    join: Join
    ready: Ready
    upload: Upload
    end: End
    declined: Declined
    leave: Leave
    sum: SumAnswer
    chunk: Chunk
    def __init__(self, join: _Optional[_Union[Join, _Mapping]] = ..., ready: _Optional[_Union[Ready, _Mapping]] = ..., upload: _Optional[_Union[Upload, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., declined: _Optional[_Union[Declined, _Mapping]] = ..., leave: _Optional[_Union[Leave, _Mapping]] = ..., sum: _Optional[_Union[SumAnswer, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class ServerFrame(_message.Message):
    __slots__ = ("welcome", "refused", "request", "end", "ack", "cancel", "goodbye", "sum", "chunk")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    refused: Refusal
    request: TrainRequest
    end: End
    ack: Ack
    cancel: Key
    goodbye: Goodbye
    sum: SumRequest
    chunk: Chunk
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., refused: _Optional[_Union[Refusal, _Mapping]] = ..., request: _Optional[_Union[TrainRequest, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., cancel: _Optional[_Union[Key, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ..., sum: _Optional[_Union[SumRequest, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ...) -> None: ...

class Join(_message.Message):
    __slots__ = ("protocol", "fedlora_version", "name", "process", "private", "schema", "secret")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDLORA_VERSION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fedlora_version: str
    name: str
    process: bytes
    private: bool
    schema: bytes
    secret: bytes
    def __init__(self, protocol: _Optional[int] = ..., fedlora_version: _Optional[str] = ..., name: _Optional[str] = ..., process: _Optional[bytes] = ..., private: _Optional[bool] = ..., schema: _Optional[bytes] = ..., secret: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "fedlora_version", "schema", "anchor", "run", "secret")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    FEDLORA_VERSION_FIELD_NUMBER: _ClassVar[int]
    SCHEMA_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SECRET_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    fedlora_version: str
    schema: bytes
    anchor: bytes
    run: RunPlan
    secret: bytes
    def __init__(self, protocol: _Optional[int] = ..., fedlora_version: _Optional[str] = ..., schema: _Optional[bytes] = ..., anchor: _Optional[bytes] = ..., run: _Optional[_Union[RunPlan, _Mapping]] = ..., secret: _Optional[bytes] = ...) -> None: ...

class Ready(_message.Message):
    __slots__ = ("labels", "working", "membership")
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WORKING_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    labels: _containers.RepeatedScalarFieldContainer[str]
    working: Key
    membership: Membership
    def __init__(self, labels: _Optional[_Iterable[str]] = ..., working: _Optional[_Union[Key, _Mapping]] = ..., membership: _Optional[_Union[Membership, _Mapping]] = ...) -> None: ...

class Leave(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("round", "attempt")
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    round: int
    attempt: int
    def __init__(self, round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("run", "round", "attempt", "frozen_sha256", "tensors", "active", "deadline_s", "prefix_sites", "prefix_ranks", "cohort")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FROZEN_SHA256_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    PREFIX_SITES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_RANKS_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    run: RunPlan
    round: int
    attempt: int
    frozen_sha256: str
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    active: _containers.RepeatedScalarFieldContainer[str]
    deadline_s: float
    prefix_sites: _containers.RepeatedScalarFieldContainer[str]
    prefix_ranks: _containers.RepeatedScalarFieldContainer[int]
    cohort: Cohort
    def __init__(self, run: _Optional[_Union[RunPlan, _Mapping]] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., frozen_sha256: _Optional[str] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., active: _Optional[_Iterable[str]] = ..., deadline_s: _Optional[float] = ..., prefix_sites: _Optional[_Iterable[str]] = ..., prefix_ranks: _Optional[_Iterable[int]] = ..., cohort: _Optional[_Union[Cohort, _Mapping]] = ...) -> None: ...

class RunPlan(_message.Message):
    __slots__ = ("run_id", "fedlora_version", "strategy", "family", "private", "model_name", "model_weights_sha256", "model_config_sha256", "model_tokenizer_sha256", "task", "labels", "max_length", "rank", "alpha", "targets", "train_head", "dropout", "rounds", "max_participations", "local_steps", "expected_batch", "optimizer", "lr", "clip_norm", "adapter_scale", "head_scale", "weight_by_examples", "lr_schedule", "wire_dtype", "private_start", "whole_gradients", "family_option_names", "family_option_values", "rank_sites", "rank_values", "adjustment", "mechanism", "least_members", "colluding", "least_noise", "hold_out", "protocol")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    FEDLORA_VERSION_FIELD_NUMBER: _ClassVar[int]
    STRATEGY_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_FIELD_NUMBER: _ClassVar[int]
    MODEL_NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    MODEL_CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    MODEL_TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_HEAD_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    MAX_PARTICIPATIONS_FIELD_NUMBER: _ClassVar[int]
    LOCAL_STEPS_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_BATCH_FIELD_NUMBER: _ClassVar[int]
    OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    LR_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_SCALE_FIELD_NUMBER: _ClassVar[int]
    HEAD_SCALE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BY_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    LR_SCHEDULE_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PRIVATE_START_FIELD_NUMBER: _ClassVar[int]
    WHOLE_GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    FAMILY_OPTION_NAMES_FIELD_NUMBER: _ClassVar[int]
    FAMILY_OPTION_VALUES_FIELD_NUMBER: _ClassVar[int]
    RANK_SITES_FIELD_NUMBER: _ClassVar[int]
    RANK_VALUES_FIELD_NUMBER: _ClassVar[int]
    ADJUSTMENT_FIELD_NUMBER: _ClassVar[int]
    MECHANISM_FIELD_NUMBER: _ClassVar[int]
    LEAST_MEMBERS_FIELD_NUMBER: _ClassVar[int]
    COLLUDING_FIELD_NUMBER: _ClassVar[int]
    LEAST_NOISE_FIELD_NUMBER: _ClassVar[int]
    HOLD_OUT_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    fedlora_version: str
    strategy: str
    family: str
    private: bool
    model_name: str
    model_weights_sha256: str
    model_config_sha256: str
    model_tokenizer_sha256: str
    task: str
    labels: _containers.RepeatedScalarFieldContainer[str]
    max_length: int
    rank: int
    alpha: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    train_head: bool
    dropout: float
    rounds: int
    max_participations: int
    local_steps: int
    expected_batch: int
    optimizer: str
    lr: float
    clip_norm: float
    adapter_scale: float
    head_scale: float
    weight_by_examples: bool
    lr_schedule: str
    wire_dtype: str
    private_start: bool
    whole_gradients: bool
    family_option_names: _containers.RepeatedScalarFieldContainer[str]
    family_option_values: _containers.RepeatedScalarFieldContainer[float]
    rank_sites: _containers.RepeatedScalarFieldContainer[str]
    rank_values: _containers.RepeatedScalarFieldContainer[int]
    adjustment: str
    mechanism: str
    least_members: int
    colluding: int
    least_noise: float
    hold_out: float
    protocol: int
    def __init__(self, run_id: _Optional[str] = ..., fedlora_version: _Optional[str] = ..., strategy: _Optional[str] = ..., family: _Optional[str] = ..., private: _Optional[bool] = ..., model_name: _Optional[str] = ..., model_weights_sha256: _Optional[str] = ..., model_config_sha256: _Optional[str] = ..., model_tokenizer_sha256: _Optional[str] = ..., task: _Optional[str] = ..., labels: _Optional[_Iterable[str]] = ..., max_length: _Optional[int] = ..., rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., train_head: _Optional[bool] = ..., dropout: _Optional[float] = ..., rounds: _Optional[int] = ..., max_participations: _Optional[int] = ..., local_steps: _Optional[int] = ..., expected_batch: _Optional[int] = ..., optimizer: _Optional[str] = ..., lr: _Optional[float] = ..., clip_norm: _Optional[float] = ..., adapter_scale: _Optional[float] = ..., head_scale: _Optional[float] = ..., weight_by_examples: _Optional[bool] = ..., lr_schedule: _Optional[str] = ..., wire_dtype: _Optional[str] = ..., private_start: _Optional[bool] = ..., whole_gradients: _Optional[bool] = ..., family_option_names: _Optional[_Iterable[str]] = ..., family_option_values: _Optional[_Iterable[float]] = ..., rank_sites: _Optional[_Iterable[str]] = ..., rank_values: _Optional[_Iterable[int]] = ..., adjustment: _Optional[str] = ..., mechanism: _Optional[str] = ..., least_members: _Optional[int] = ..., colluding: _Optional[int] = ..., least_noise: _Optional[float] = ..., hold_out: _Optional[float] = ..., protocol: _Optional[int] = ...) -> None: ...

class Upload(_message.Message):
    __slots__ = ("key", "tensors", "steps", "delta", "noise_multiplier", "num_examples", "train_loss", "anchor")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    NOISE_MULTIPLIER_FIELD_NUMBER: _ClassVar[int]
    NUM_EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    ANCHOR_FIELD_NUMBER: _ClassVar[int]
    key: Key
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    steps: int
    delta: float
    noise_multiplier: float
    num_examples: int
    train_loss: float
    anchor: bytes
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., steps: _Optional[int] = ..., delta: _Optional[float] = ..., noise_multiplier: _Optional[float] = ..., num_examples: _Optional[int] = ..., train_loss: _Optional[float] = ..., anchor: _Optional[bytes] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("code", "detail")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    code: str
    detail: str
    def __init__(self, code: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Declined(_message.Message):
    __slots__ = ("key", "refusal")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    key: Key
    refusal: Refusal
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("key", "refusal")
    KEY_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    key: Key
    refusal: Refusal
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ...) -> None: ...

class Membership(_message.Message):
    __slots__ = ("certificate", "sealing_key", "signature", "noise")
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    certificate: bytes
    sealing_key: bytes
    signature: bytes
    noise: float
    def __init__(self, certificate: _Optional[bytes] = ..., sealing_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., noise: _Optional[float] = ...) -> None: ...

class SumRequest(_message.Message):
    __slots__ = ("roster", "package", "survivors", "closing")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    SURVIVORS_FIELD_NUMBER: _ClassVar[int]
    CLOSING_FIELD_NUMBER: _ClassVar[int]
    roster: Roster
    package: Key
    survivors: Survivors
    closing: Closing
    def __init__(self, roster: _Optional[_Union[Roster, _Mapping]] = ..., package: _Optional[_Union[Key, _Mapping]] = ..., survivors: _Optional[_Union[Survivors, _Mapping]] = ..., closing: _Optional[_Union[Closing, _Mapping]] = ...) -> None: ...

class SumAnswer(_message.Message):
    __slots__ = ("roster", "package", "agreement", "reveal", "declined")
    ROSTER_FIELD_NUMBER: _ClassVar[int]
    PACKAGE_FIELD_NUMBER: _ClassVar[int]
    AGREEMENT_FIELD_NUMBER: _ClassVar[int]
    REVEAL_FIELD_NUMBER: _ClassVar[int]
    DECLINED_FIELD_NUMBER: _ClassVar[int]
    roster: bytes
    package: KeyPackage
    agreement: Agreement
    reveal: Reveal
    declined: Declined
    def __init__(self, roster: _Optional[bytes] = ..., package: _Optional[_Union[KeyPackage, _Mapping]] = ..., agreement: _Optional[_Union[Agreement, _Mapping]] = ..., reveal: _Optional[_Union[Reveal, _Mapping]] = ..., declined: _Optional[_Union[Declined, _Mapping]] = ...) -> None: ...

class Roster(_message.Message):
    __slots__ = ("entries", "colluding", "clip_norm", "fraction_bits", "ring_bits", "most", "values", "noise")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    COLLUDING_FIELD_NUMBER: _ClassVar[int]
    CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    FRACTION_BITS_FIELD_NUMBER: _ClassVar[int]
    RING_BITS_FIELD_NUMBER: _ClassVar[int]
    MOST_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    NOISE_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[Entry]
    colluding: int
    clip_norm: float
    fraction_bits: int
    ring_bits: int
    most: int
    values: int
    noise: float
    def __init__(self, entries: _Optional[_Iterable[_Union[Entry, _Mapping]]] = ..., colluding: _Optional[int] = ..., clip_norm: _Optional[float] = ..., fraction_bits: _Optional[int] = ..., ring_bits: _Optional[int] = ..., most: _Optional[int] = ..., values: _Optional[int] = ..., noise: _Optional[float] = ...) -> None: ...

class Entry(_message.Message):
    __slots__ = ("name", "certificate", "sealing_key", "signature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SEALING_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    certificate: bytes
    sealing_key: bytes
    signature: bytes
    def __init__(self, name: _Optional[str] = ..., certificate: _Optional[bytes] = ..., sealing_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class PublicKeys(_message.Message):
    __slots__ = ("name", "mask_key", "seed_digest", "signature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MASK_KEY_FIELD_NUMBER: _ClassVar[int]
    SEED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    mask_key: bytes
    seed_digest: bytes
    signature: bytes
    def __init__(self, name: _Optional[str] = ..., mask_key: _Optional[bytes] = ..., seed_digest: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ForMember(_message.Message):
    __slots__ = ("name", "content")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    name: str
    content: bytes
    def __init__(self, name: _Optional[str] = ..., content: _Optional[bytes] = ...) -> None: ...

class KeyPackage(_message.Message):
    __slots__ = ("key", "keys", "sealed")
    KEY_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    key: Key
    keys: PublicKeys
    sealed: _containers.RepeatedCompositeFieldContainer[ForMember]
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., keys: _Optional[_Union[PublicKeys, _Mapping]] = ..., sealed: _Optional[_Iterable[_Union[ForMember, _Mapping]]] = ...) -> None: ...

class Cohort(_message.Message):
    __slots__ = ("keys", "sealed", "sent")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[PublicKeys]
    sealed: _containers.RepeatedCompositeFieldContainer[ForMember]
    sent: bytes
    def __init__(self, keys: _Optional[_Iterable[_Union[PublicKeys, _Mapping]]] = ..., sealed: _Optional[_Iterable[_Union[ForMember, _Mapping]]] = ..., sent: _Optional[bytes] = ...) -> None: ...

class Survivors(_message.Message):
    __slots__ = ("key", "names")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    key: Key
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ...) -> None: ...

class Agreement(_message.Message):
    __slots__ = ("key", "signature")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    key: Key
    signature: bytes
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., signature: _Optional[bytes] = ...) -> None: ...

class Closing(_message.Message):
    __slots__ = ("key", "names", "signatures")
    KEY_FIELD_NUMBER: _ClassVar[int]
    NAMES_FIELD_NUMBER: _ClassVar[int]
    SIGNATURES_FIELD_NUMBER: _ClassVar[int]
    key: Key
    names: _containers.RepeatedScalarFieldContainer[str]
    signatures: _containers.RepeatedCompositeFieldContainer[ForMember]
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., names: _Optional[_Iterable[str]] = ..., signatures: _Optional[_Iterable[_Union[ForMember, _Mapping]]] = ...) -> None: ...

class Reveal(_message.Message):
    __slots__ = ("key", "seeds", "keys")
    KEY_FIELD_NUMBER: _ClassVar[int]
    SEEDS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    key: Key
    seeds: _containers.RepeatedCompositeFieldContainer[ForMember]
    keys: _containers.RepeatedCompositeFieldContainer[ForMember]
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., seeds: _Optional[_Iterable[_Union[ForMember, _Mapping]]] = ..., keys: _Optional[_Iterable[_Union[ForMember, _Mapping]]] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("data", "checksum")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    checksum: int
    def __init__(self, data: _Optional[bytes] = ..., checksum: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
