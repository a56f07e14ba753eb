"""The committed stubs on protobuf 7, in an environment that has nothing else: `python -m tests.protobuf7`."""

import google.protobuf

from protos import swarm_pb2, swarm_pb2_grpc


def main() -> None:
    """Exits with a traceback when the stubs do not import or a message does not survive the trip."""
    assert google.protobuf.__version__.startswith("7."), google.protobuf.__version__
    frame = swarm_pb2.CallFrame(
        header=swarm_pb2.CallHeader(
            call_id=bytes(range(16)),
            mode=swarm_pb2.MODE_TRAIN,
            experts=[swarm_pb2.ExpertRows(index=3, num_rows=17, version=2)],
            tensors=[swarm_pb2.TensorHeader(role=swarm_pb2.ROLE_ROWS, shape=[17, 128], size_bytes=17 * 128 * 4)],
        )
    )
    again = swarm_pb2.CallFrame.FromString(frame.SerializeToString())
    assert again == frame
    assert again.WhichOneof("frame") == "header"
    assert hasattr(swarm_pb2_grpc, "ExpertStub")
    print(f"the stubs import on protobuf {google.protobuf.__version__} and a message survives the trip")


if __name__ == "__main__":
    main()
