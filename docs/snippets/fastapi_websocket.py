"""A WebSocket that moves to the new process with its counter; run it with --ws websockets-sansio."""

import os

from fastapi import FastAPI, WebSocket, WebSocketDisconnect

app = FastAPI()


@app.websocket("/count")
async def count(websocket: WebSocket) -> None:
    # It is None under other servers and in tests.
    transfer = websocket.scope.get("state", {}).get("ecdysis.transfer")
    number = (transfer.inherited if transfer else None) or 0
    # In the new process this returns at once: the client was accepted long ago.
    await websocket.accept()
    try:
        while True:
            if transfer:
                # From here until the next message has come, this connection can move.
                transfer.offer(number)
            text = await websocket.receive_text()
            number += 1
            await websocket.send_text(f"{number} from {os.getpid()}: {text}")
    except WebSocketDisconnect:
        pass
