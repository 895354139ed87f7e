"""A camera, an RTSP stream or a video file, as pictures. The only importer of OpenCV (extra ``[camera]``)."""

import time
from typing import Any

from agent.core.pipelines import CameraSource
from agent.inference.pipelines.flow import Feed, Frame, SourceFailed

OPEN_MS = READ_MS = 5000  # of a stream over the network; OpenCV's own patience is 30 s


class CameraFrames:
    """Implements `flow.Source` with OpenCV."""

    def __init__(self, settings: CameraSource) -> None:
        """Open nothing yet."""
        self._device = settings.device
        self._pause = 1.0 / settings.fps if settings.fps else 0.0

    def run(self, feed: Feed) -> None:
        """Hand over pictures as they come; raise `SourceFailed` when none come any more."""
        try:
            import cv2
        except ImportError as error:
            raise SourceFailed("cameras need OpenCV: pip install 'edgewarden[camera]'") from error
        camera = self._open(cv2)
        try:
            self._read(cv2, camera, feed)
        finally:
            camera.release()

    def _open(self, cv2: Any) -> Any:
        if "://" in self._device:
            patience = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, OPEN_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, READ_MS]
            camera = cv2.VideoCapture(self._device, cv2.CAP_FFMPEG, patience)
        elif self._device.startswith("/dev/"):
            camera = cv2.VideoCapture(self._device, cv2.CAP_V4L2)
        else:
            camera = cv2.VideoCapture(self._device)
        if not camera.isOpened():
            camera.release()
            raise SourceFailed(f"{self._device} cannot be opened, or another program has it")
        return camera

    def _read(self, cv2: Any, camera: Any, feed: Feed) -> None:
        number, due = 0, 0.0
        while not feed.stop.is_set():
            if not camera.grab():
                raise SourceFailed(f"{self._device} gives no more pictures")
            feed.up()
            number += 1
            if time.monotonic() < due:
                continue  # grabbed and not decoded: cheap
            due = time.monotonic() + self._pause
            there, picture = camera.retrieve()
            if there and not feed.put(_frame(number, cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))):
                return


def _frame(number: int, picture: Any) -> Frame:
    return Frame(name=str(number), read=lambda: picture)
