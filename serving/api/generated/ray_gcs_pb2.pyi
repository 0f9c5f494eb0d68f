from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GcsStatus(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class GetAllNodeInfoRequest(_message.Message):
    __slots__ = ("node_selectors",)
    class NodeSelector(_message.Message):
        __slots__ = ("node_id", "node_name", "node_ip_address")
        NODE_ID_FIELD_NUMBER: _ClassVar[int]
        NODE_NAME_FIELD_NUMBER: _ClassVar[int]
        NODE_IP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
        node_id: bytes
        node_name: str
        node_ip_address: str
        def __init__(self, node_id: _Optional[bytes] = ..., node_name: _Optional[str] = ..., node_ip_address: _Optional[str] = ...) -> None: ...
    NODE_SELECTORS_FIELD_NUMBER: _ClassVar[int]
    node_selectors: _containers.RepeatedCompositeFieldContainer[GetAllNodeInfoRequest.NodeSelector]
    def __init__(self, node_selectors: _Optional[_Iterable[_Union[GetAllNodeInfoRequest.NodeSelector, _Mapping]]] = ...) -> None: ...

class GetAllNodeInfoReply(_message.Message):
    __slots__ = ("status", "node_info_list")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    NODE_INFO_LIST_FIELD_NUMBER: _ClassVar[int]
    status: GcsStatus
    node_info_list: _containers.RepeatedCompositeFieldContainer[GcsNodeInfo]
    def __init__(self, status: _Optional[_Union[GcsStatus, _Mapping]] = ..., node_info_list: _Optional[_Iterable[_Union[GcsNodeInfo, _Mapping]]] = ...) -> None: ...

class GcsNodeInfo(_message.Message):
    __slots__ = ("node_id", "node_manager_address", "state", "death_info")
    class GcsNodeState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        ALIVE: _ClassVar[GcsNodeInfo.GcsNodeState]
        DEAD: _ClassVar[GcsNodeInfo.GcsNodeState]
    ALIVE: GcsNodeInfo.GcsNodeState
    DEAD: GcsNodeInfo.GcsNodeState
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_MANAGER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    DEATH_INFO_FIELD_NUMBER: _ClassVar[int]
    node_id: bytes
    node_manager_address: str
    state: GcsNodeInfo.GcsNodeState
    death_info: NodeDeathInfo
    def __init__(self, node_id: _Optional[bytes] = ..., node_manager_address: _Optional[str] = ..., state: _Optional[_Union[GcsNodeInfo.GcsNodeState, str]] = ..., death_info: _Optional[_Union[NodeDeathInfo, _Mapping]] = ...) -> None: ...

class NodeDeathInfo(_message.Message):
    __slots__ = ("reason",)
    class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNSPECIFIED: _ClassVar[NodeDeathInfo.Reason]
        EXPECTED_TERMINATION: _ClassVar[NodeDeathInfo.Reason]
        UNEXPECTED_TERMINATION: _ClassVar[NodeDeathInfo.Reason]
        AUTOSCALER_DRAIN_PREEMPTED: _ClassVar[NodeDeathInfo.Reason]
        AUTOSCALER_DRAIN_IDLE: _ClassVar[NodeDeathInfo.Reason]
    UNSPECIFIED: NodeDeathInfo.Reason
    EXPECTED_TERMINATION: NodeDeathInfo.Reason
    UNEXPECTED_TERMINATION: NodeDeathInfo.Reason
    AUTOSCALER_DRAIN_PREEMPTED: NodeDeathInfo.Reason
    AUTOSCALER_DRAIN_IDLE: NodeDeathInfo.Reason
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: NodeDeathInfo.Reason
    def __init__(self, reason: _Optional[_Union[NodeDeathInfo.Reason, str]] = ...) -> None: ...

class GetDrainingNodesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetDrainingNodesReply(_message.Message):
    __slots__ = ("status", "draining_nodes")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_NODES_FIELD_NUMBER: _ClassVar[int]
    status: GcsStatus
    draining_nodes: _containers.RepeatedCompositeFieldContainer[DrainingNode]
    def __init__(self, status: _Optional[_Union[GcsStatus, _Mapping]] = ..., draining_nodes: _Optional[_Iterable[_Union[DrainingNode, _Mapping]]] = ...) -> None: ...

class DrainingNode(_message.Message):
    __slots__ = ("node_id", "draining_deadline_timestamp_ms")
    NODE_ID_FIELD_NUMBER: _ClassVar[int]
    DRAINING_DEADLINE_TIMESTAMP_MS_FIELD_NUMBER: _ClassVar[int]
    node_id: bytes
    draining_deadline_timestamp_ms: int
    def __init__(self, node_id: _Optional[bytes] = ..., draining_deadline_timestamp_ms: _Optional[int] = ...) -> None: ...
