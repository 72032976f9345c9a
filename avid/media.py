"""Pictures and sound out of one file, by time.

In: a path. Out: frames shown at given times, mono sound of an interval, its log spectrogram, on one clock
that begins with the file. Frames come from decord where a file is proven to be one that it reads right, else
from PyAV; sound comes from PyAV.
"""

import contextlib
import copy
import ctypes
import functools
import itertools
import os
import re
import zlib
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
import torchaudio
from av.video.reformatter import VideoReformatter

MODALITIES = ("video", "audio")
WARM_UP_S = 0.15  # sound that a decoder needs before it is right
WARM_UP_MP3_S = 0.6  # a frame of MP3 may need the 511 bytes before it: half a second at 8 kb/s
RESAMPLER_S = 0.01  # more than the resampler's reach
PADDING_S = 0.1  # more than the part of the last packet that an encoder fills up
LOWEST_HZ, HIGHEST_HZ = 1000, 768000  # of sound; other rates stand in damaged headers
# containers whose time stamps are true also after a seek; others are read through once
STAMPED = ("mov", "matroska", "asf")
SAME_S = 1e-4  # times of frames that lie closer are the same: decord has them in float32
FAR_S = 5.0  # between two frames: to seek the later one costs less than to decode what lies between
BACKWARDS_S = 0.5  # a time stamp this much before the one before it is a clock that was set back
LOST_S = 0.1  # of an AVI's packets, which have no time stamps and are counted
LONGEST_S = 1e8  # of a time stamp: three years


def import_decord():
    """decord, with its libraries for itself alone.

    Its import opens NVIDIA's libraries and its own for the whole process: what is loaded later is given their
    symbols, NVBLAS for BLAS, which returns wrong products. Decoding on a CPU needs none of NVIDIA's.
    """
    plain = ctypes.CDLL

    def only_its_own(path, mode=ctypes.RTLD_LOCAL):
        if "decord" not in os.path.basename(path):
            raise OSError(f"{path} is not opened for decord")
        return plain(path)

    ctypes.CDLL = only_its_own
    try:
        import decord
    finally:
        ctypes.CDLL = plain
    decord.logging.set_level(decord.logging.QUIET)  # what cannot be decoded is a MediaError
    return decord


decord = import_decord()


class MediaError(Exception):
    """A file that cannot be used, and why, in one line."""


class Media:
    """An open file: frames and sound on one clock that begins with the file.

    first_s and last_s bound the part where every wanted modality is present; start_s and end_s narrow it
    further. reader gives the frames (Counted or Timed), and why_not_decord says why they are not decord's
    ("": they are). Raises MediaError where a wanted modality is missing or cannot be read.
    """

    def __init__(self, path, modalities=MODALITIES, start_s=0.0, end_s=np.inf):
        self.path = os.path.abspath(path)  # a relative one may look like http:…
        self.container = self.reader = self.stream = None
        self.first_s, self.last_s = start_s, end_s
        with contextlib.ExitStack() as in_vain, faults("cannot be opened"):
            in_vain.callback(self.close)
            self.container = av.open(self.path, metadata_errors="ignore")
            self.origin_s = (self.container.start_time or 0) / av.time_base
            if "audio" in modalities:
                self._open_sound()
            if "video" in modalities:
                self._open_picture()
            in_vain.pop_all()

    def _open_sound(self):
        self.stream = self.container.streams.best("audio")
        if self.stream is None:
            raise MediaError("no sound")
        if self.stream.codec_context is None or not self.stream.rate:
            raise MediaError("sound of an unknown codec or rate")
        if not LOWEST_HZ <= self.stream.rate <= HIGHEST_HZ:
            raise MediaError(f"sound at an impossible rate of {self.stream.rate} Hz")
        self.stream.thread_count = 1
        self.source_hz = self.stream.rate
        self.sound_first_s = first_s = start_of(self.stream) - self.origin_s
        if self.container.format.name.startswith(("mov", "wav")) and self.stream.duration:
            last_s = self.promised_s = first_s + float(self.stream.duration * self.stream.time_base)
        else:  # what it says of its length may be an estimate, or that of another stream
            last_s = once_a_file(read_through, self.container, self.stream).end_s - self.origin_s
            self.promised_s = last_s - PADDING_S  # until when there has to be sound
        self._usable(first_s, last_s)

    def _open_picture(self):
        stream = picture_of(self.container)
        if stream is None:
            raise MediaError("no picture")
        self.why_not_decord = once_a_file(why_not_decord, self.container, stream)
        if not self.why_not_decord:
            try:
                self.reader = Counted(self.path, self.container, stream, self.origin_s)
            except Exception as error:
                self.why_not_decord = f"decord: {_reason(error)}"
        if self.why_not_decord:
            self.reader = Timed(self.path, self.container, stream, self.origin_s)
        self._usable(self.reader.first_s, self.reader.last_s)

    def _usable(self, first_s, last_s):
        self.first_s, self.last_s = max(self.first_s, first_s), min(self.last_s, last_s)
        if not self.last_s > self.first_s:
            raise MediaError("picture and sound, or the asked part, do not overlap in time")

    def frames(self, times_s):
        """The frames shown at these times, in any order: uint8 T×H×W×3; before the first one, that one."""
        with faults("picture cannot be decoded"):
            return self.reader.frames(np.asarray(times_s))

    def sound(self, start_s, samples, rate_hz):
        """`samples` samples of mono sound at rate_hz from start_s on: float32; silence where none is."""
        with faults("sound cannot be decoded"):
            source = self._decode(start_s - RESAMPLER_S, samples / rate_hz + 2 * RESAMPLER_S)
        source = torch.from_numpy(source).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        waveform = resampler(self.source_hz, rate_hz)(source)
        skip = round(RESAMPLER_S * rate_hz)
        return waveform[skip : skip + samples].numpy()

    def _decode(self, start_s, seconds):
        """The sound of an interval at the file's own rate, decoded from a place before it on."""
        nothing, codec = False, self.stream.codec_context.name
        warm_up_s = WARM_UP_MP3_S if codec.startswith("mp3") else WARM_UP_S
        places = start_s - warm_up_s, start_s - 2.0, start_s - 8.0
        if codec == "flac" and self.container.format.name == "ogg":  # near the end a seek gives wrong stamps
            places = ()
        for from_s in (*places, -WARM_UP_S):  # before the beginning lies the lead-in of many encoders
            self._seek(from_s)
            try:
                placed = self._place(start_s, seconds, sought=from_s > 0)
            except EOFError:  # from here on there is no sound
                nothing = True
            except av.error.InvalidDataError:  # some containers' index leads into the middle of a packet
                if from_s <= 0:
                    if nothing:
                        raise MediaError("the file is cut off") from None
                    raise
            else:
                if placed is not None:
                    return placed

    def _sounds(self):
        """The frames of sound from here on, without those packets that a cut through one makes useless."""
        begun = False
        while True:
            try:
                for frame in self.container.decode(self.stream):
                    begun = True
                    yield frame
                return
            except av.error.InvalidDataError:
                if begun:
                    raise

    def _seek(self, time_s):
        if self.container.format.name == "ogg":  # only the first seek in an open one gives true time stamps
            self.container = av.open(self.path, metadata_errors="ignore")
            self.stream = self.container.streams.best("audio")
            self.stream.thread_count = 1
        # some containers cannot be asked for a time before their beginning, where others have a lead-in;
        # some only for one of the picture
        for at_s, stream in ((time_s, self.stream), (time_s, None), (0.0, self.stream), (0.0, None)):
            try:
                return seek(self.container, stream, at_s + self.origin_s)
            except av.FFmpegError:
                if at_s == 0 and stream is None:
                    raise

    def _place(self, start_s, seconds, sought):
        """The sound from here on, mixed to mono, at its place in the interval. None: here is too late."""
        source_hz = self.source_hz
        planes = None  # for sounds of another sample format or rate
        placed, at = np.zeros(round(seconds * source_hz), np.float32), None
        for frame in self._sounds():
            # of HE-AAC the decoder makes twice the rate; stamps of ADTS and MPEG-TS are counted at one rate
            if self.container.format.name in ("aac", "mpegts") and (
                frame.sample_rate not in (source_hz, 2 * source_hz)
            ):
                raise MediaError(f"its sound changes from {source_hz} to {frame.sample_rate} Hz")
            if frame.time is not None:
                begin = round((frame.time - self.origin_s - start_s) * source_hz)
            elif at is not None:
                begin = at
            elif sought:
                return None
            else:
                begin = round(-start_s * source_hz)
            if at is None and sought and begin > 0 and begin / source_hz + start_s > self.first_s + 0.05:
                return None
            # stamps of some containers are rounded to milliseconds: small steps are not gaps
            at = begin if at is None or abs(begin - at) > 0.02 * source_hz else at
            if at >= len(placed):
                return placed
            if at + frame.samples <= 0:  # still warming up
                at += frame.samples
                continue
            plain = frame.format.name == "fltp" and frame.sample_rate == source_hz
            if not plain and planes is None:
                planes = av.AudioResampler(format="fltp", rate=source_hz)
            for part in (frame,) if plain else planes.resample(frame):
                planar = part.planes[: part.layout.nb_channels]  # of 8 and more PyAV gives too many
                channels = [np.frombuffer(plane, np.float32, part.samples) for plane in planar]  # n each
                paste(np.mean(channels, 0) if len(channels) > 1 else channels[0], placed, at)
                at += part.samples
        if at is None and sought:
            raise EOFError
        if (at is None or at <= 0) and start_s + seconds < self.promised_s:
            raise MediaError("the file is cut off")
        return placed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close_picture(self):
        """No more frames are wanted: else decord's thread decodes ahead, a sixth of a sample's work."""
        self.reader = None

    def close(self):
        if self.container is not None:
            self.container.close()
        self.container = self.reader = self.stream = None


class Counted:
    """Frames by decord, by their number in the file: it seeks a key frame and counts from there."""

    way = "decord"

    def __init__(self, path, container, stream, origin_s):
        self.reader = decord.VideoReader(path, num_threads=1)
        starts_s = self.reader.get_frame_timestamp(np.arange(len(self.reader)))[:, 0].astype(float)
        if not (len(starts_s) and abs(starts_s).max() < 1e4 and (np.diff(starts_s) > 0).all()):
            raise ValueError("no times of frames, or not exact ones")
        self.starts_s = start_of(stream) - origin_s + (starts_s - starts_s[0])  # N
        self.fps = self.reader.get_avg_fps()
        self.first_s, self.last_s = self.starts_s[0], self.starts_s[-1] + 1 / self.fps

    def frames(self, times_s):
        wanted, back = np.unique(shown(self.starts_s, times_s), return_inverse=True)
        return self.reader.get_batch(wanted).asnumpy()[back]

    def whole(self):
        """When each frame is first shown (N,), and all of them N×H×W×3."""
        return self.starts_s, self.reader.get_batch(np.arange(len(self.starts_s))).asnumpy()


class Timed:
    """Frames by PyAV, by their time stamps, decoded from a key frame before the asked time on.

    Frames that an edit list hides are left out by the decoder, and those that are shown before that key frame
    by this class: they lack what they were predicted from. Many containers give true time stamps only when
    they are read from the beginning on: that is done once, and packets that are found by seeking get the
    stamps that they had then.
    """

    way = "PyAV"

    def __init__(self, path, container, stream, origin_s):
        self.path, self.container, self.stream, self.origin_s = path, container, stream, origin_s
        self.stream.thread_count = 1
        self.converter = VideoReformatter()
        self.fps = float(stream.average_rate or 25)
        self.packets = None
        if not container.format.name.startswith(STAMPED):
            self.packets = once_a_file(read_through, self._reopened(), self.stream)
        # the order in which AVI shows packets is a guess, which fails for B frames in pyramids
        pyramids = stream.codec_context.name in ("h264", "hevc") and stream.codec_context.has_b_frames
        self.in_order = container.format.name == "avi" and pyramids
        # ASF says when packets are decoded; of these codecs FFmpeg guesses wrong when their frames are shown
        guessed = stream.codec_context.name in ("h264", "hevc", "mpeg1video", "mpeg2video")
        self.by_output = container.format.name == "asf" and guessed
        self.first_s, self.last_s = once_a_file(self._extent, self.container, self.stream)

    @functools.cached_property
    def starts_s(self):
        """When each frame is first shown (N,): all of them are decoded."""
        return np.array([start_s for start_s, _ in self._decoded(self._reopened())])

    def _extent(self, *_):
        """When the first frame is shown and until when the last one is, s."""
        first_s, _ = next(self._decoded(self._reopened()), (None, None))
        if first_s is None:
            raise MediaError("no picture in the video stream")
        return first_s, (self.packets or read_through(self.container, self.stream)).end_s - self.origin_s

    def frames(self, times_s):
        wanted, back = np.unique(times_s, return_inverse=True)
        images, frames, now, ahead = [], iter(()), None, None
        for time_s in wanted + SAME_S:
            if now is None or time_s > now[0] + FAR_S:
                frames = self._from(time_s)
                now, ahead, image = next(frames, None), next(frames, None), None
                if now is None:
                    raise MediaError("no picture in the video stream")
            while ahead is not None and ahead[0] <= time_s:
                now, ahead, image = ahead, next(frames, None), None
            image = self.image(now[1]) if image is None else image
            images.append(image)
        return np.stack(images)[back]

    def whole(self):
        """When each frame is first shown (N,), and all of them N×H×W×3."""
        frames = [(start_s, self.image(frame)) for start_s, frame in self._decoded(self._reopened())]
        return np.array([start_s for start_s, _ in frames]), np.stack([image for _, image in frames])

    def image(self, frame):
        """A PyAV frame as an image H×W×3 uint8, mirrored and turned as the file asks; decord turns itself."""
        # frame.to_ndarray would make a converter for each frame, which takes seven times as long
        image = self.converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        matrices = [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
        return np.rot90(image[::-1] if any(map(mirrors, matrices)) else image, frame.rotation // 90)

    def _from(self, time_s):
        """Yield (start, frame) in the order of time, from the one shown at time_s or the file's first on."""
        time_s = max(time_s, self.first_s + SAME_S)
        for back_s in () if self.in_order or self.by_output else (0.0, 1.0, 3.0, 7.0, 15.0, 31.0):
            with contextlib.suppress(av.FFmpegError):  # there is another place
                seek(self.container, self.stream, max(time_s - back_s, self.first_s) + self.origin_s)
                frames = self._decoded(self.container, until_s=time_s)
                first = next(frames, None)
                if first is not None and first[0] <= time_s:
                    return itertools.chain([first], frames)
        return self._decoded(self._reopened())

    def _reopened(self):
        self.container = av.open(self.path, metadata_errors="ignore")
        self.stream = self.container.streams.best("video")
        self.stream.thread_count = 1
        return self.container

    def _decoded(self, container, until_s=np.inf):
        """Yield (start, frame) from the next key frame on; none if that is shown after until_s."""
        key = number = start_s = None
        for packet in container.demux(self.stream):
            if number is None:
                number = self._number(packet)
                if number is None:
                    continue
                in_order = iter(sorted(self.packets.stamps)[number:] if self.in_order else ())
            if self.packets and packet.size:
                packet.pts, number = self.packets.stamps[number], number + 1
            if key is None:
                key = packet.pts
                if key is not None and self._time(key) > until_s:
                    return
            for frame in packet.decode():
                stamp = frame.dts if self.by_output else frame.pts  # dts: of the packet that brought it out
                stamp = next(in_order, None) if self.in_order else stamp
                if None not in (stamp, key) and stamp < key and not self.by_output:
                    continue
                time_s = self._time(stamp) if stamp is not None else (start_s or 0.0) + 1 / self.fps
                if start_s is not None and time_s < start_s - BACKWARDS_S:
                    raise MediaError(f"its time stamps run backwards at {start_s:.1f} s")
                start_s = time_s if start_s is None else max(start_s, time_s)
                yield start_s, frame

    def _number(self, packet):
        """The number of a key frame's packet, else None; 0 where the container's own stamps are true."""
        if not packet.is_keyframe or self.packets is None:
            return 0 if packet.is_keyframe else None
        stamps, alike = self.packets.stamps, self.packets.alike.get(zlib.crc32(packet), ())
        return min(alike, key=lambda number: abs(stamps[number] - (packet.dts or 0)), default=None)

    def _time(self, stamp):
        return float(stamp * self.stream.time_base) - self.origin_s


def picture_of(container):
    """The stream of an open file's picture; None where it has none, or only a cover."""
    stream = container.streams.best("video")
    cover = stream is not None and stream.disposition & av.stream.Disposition.attached_pic
    return None if cover else stream


def held(path):
    """What a file holds, of MODALITIES; a cover is no picture. Raises MediaError where it is nothing."""
    with faults("cannot be opened"), av.open(os.path.abspath(path), metadata_errors="ignore") as container:
        there = {"video": picture_of(container), "audio": container.streams.best("audio")}
        there = {modality: stream is not None for modality, stream in there.items()}
        if not any(there.values()):
            raise MediaError("neither picture nor sound")
        return tuple(modality for modality in MODALITIES if there[modality])


class MediaInMemory(Media):
    """A file that was decoded whole and closed: the frames and the sound that Media gives, without decoding.

    It holds H·W·3 bytes a frame and 4 a sample of mono sound at the file's own rate. Frames are the same
    bits. So is sound, but where two readings of Media that begin at different places differ, too: Matroska
    rounds time stamps to milliseconds, and AAC with noise substitution (many encoders' default, not the
    toy's) leaves noise to the decoder, who makes it up anew, as loud. Raises MediaError where a file cannot
    be decoded to its end.
    """

    def __init__(self, path, modalities=MODALITIES, start_s=0.0, end_s=np.inf):
        super().__init__(path, modalities, start_s, end_s)
        with self, faults("cannot be decoded"):  # and close it
            if "video" in modalities:
                self.starts_s, self.images = self.reader.whole()  # N, N×H×W×3
            if "audio" in modalities:
                super()._decode(self.promised_s - 0.1, 0.05)  # is the end there?
                last_s = max(self.promised_s, (self.container.duration or 0) / av.time_base) + 1.0
                samples = super()._decode(self.sound_first_s, last_s - self.sound_first_s)
                self.samples = np.trim_zeros(samples, "b")  # silence follows anyway

    def frames(self, times_s):
        return self.images[shown(self.starts_s, times_s)]

    def _decode(self, start_s, seconds):
        placed = np.zeros(round(seconds * self.source_hz), np.float32)
        paste(self.samples, placed, round((self.sound_first_s - start_s) * self.source_hz))
        return placed


@functools.cache
def in_memory(path, modalities=MODALITIES, start_s=0.0, end_s=np.inf):
    """The MediaInMemory of a part of a file, which is decoded whole, once a process, and kept for all of its
    parts; None where it cannot be decoded whole.
    """
    if (start_s, end_s) == (0.0, np.inf):
        with contextlib.suppress(MediaError):
            return MediaInMemory(path, modalities)
        return None
    part = copy.copy(in_memory(path, modalities, 0.0, np.inf))  # pictures and sound are shared
    if part is not None:
        part._usable(start_s, end_s)
    return part


def paste(samples, placed, at):
    """Copy samples (n) into placed (N) from its index `at` on, as far as they lie within."""
    left, right = max(at, 0), min(at + len(samples), len(placed))
    if right > left:
        placed[left:right] = samples[left - at : right - at]


@contextlib.contextmanager
def faults(what):
    """A decoder may say no in any way: every exception becomes a MediaError; the caller names the file."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{what}: {_reason(error)}") from error


def _reason(error):
    """The decoder's complaint in one line, without the file's name and the place in its source."""
    if isinstance(error, (OSError, av.FFmpegError)) and error.strerror:
        return error.strerror
    lines = [re.sub(r"\[([\d:]+|/.*?)\] (\S+:\d+: )?", "", line).strip() for line in str(error).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), 'no reason given')[-200:]}"


def shown(starts_s, times_s):
    """The numbers of the frames on show at these times (T,), each shown from starts_s (N,) on; 0 before."""
    return (np.searchsorted(starts_s, np.asarray(times_s) + SAME_S, side="right") - 1).clip(0)


def why_not_decord(container, stream):
    """Why decord may not read the frames of this file; "": its frame k is proven to be the k-th one shown.

    It seeks a key frame and counts from there. So every frame has to be shown, and after a key frame none may
    be shown that comes before it: H.264 says so of its IDR pictures, which the index leads to. Of some narrow
    pictures (16, 24, 32, 48, 96, 144 pixels) decord takes the padding of the rows for channels.
    """
    padded, entries = -(-stream.width // 64) * 64, list(stream.index_entries)
    if not container.format.name.startswith("mov,") or stream.codec_context.name != "h264":
        return f"{stream.codec_context.name} in {container.format.name}"
    if padded != stream.width and 3 * padded % stream.width == 0:
        return "narrow picture"
    if len(stream.codec_context.extradata or b"") < 5 or stream.codec_context.extradata[4] & 3 != 3:
        return "lengths of other than 4 bytes between its pictures"
    if any(entry.is_discard for entry in entries):
        return "an edit list hides frames"
    if not entries or not entries[0].is_keyframe:
        return "no index"
    with open(container.name, "rb") as file:
        if not all(is_idr(file, entry) for entry in entries if entry.is_keyframe):
            return "open groups of pictures"
        if turned_over(file, 0, os.path.getsize(container.name)):
            return "mirrored"
    return ""


def is_idr(file, entry):
    """Whether an index entry of H.264 in MP4 is an IDR picture: the kind of its first NAL unit of a slice."""
    at, end = entry.pos, entry.pos + entry.size
    while at + 5 <= end:
        file.seek(at)
        head = file.read(5)  # 4 bytes of length, and one with the kind in its lower bits
        if len(head) < 5 or head[4] & 31 in (1, 2, 3, 4, 5):
            return len(head) == 5 and head[4] & 31 == 5
        at += 4 + int.from_bytes(head[:4], "big")
    return False


def turned_over(file, at, end):
    """Whether the display matrix of a track of MP4 mirrors it: boxes of the file lie from `at` to `end`."""
    while at + 8 <= end:
        file.seek(at)
        head = file.read(16)
        size, kind, begin = int.from_bytes(head[:4], "big"), head[4:8], at + 8
        if size == 1:  # the size stands behind the kind
            size, begin = int.from_bytes(head[8:16], "big"), at + 16
        size = size or end - at  # 0: to the end
        if size < 8:
            return False
        if kind in (b"moov", b"trak") and turned_over(file, begin, at + size):
            return True
        if kind == b"tkhd":
            file.seek(begin)
            content = file.read(88)
            if mirrors(content[52 if content[:1] == b"\1" else 40 :], ">i4"):
                return True
        at += size
    return False


def mirrors(matrix, kind="=i4"):
    """Whether a display matrix, the bytes of rows a b u, c d v, x y w, has a negative determinant."""
    a, b, _, c, d = np.frombuffer(matrix[:20], kind).astype(float)
    return bool(a * d < b * c)


def start_of(stream):
    """The first time stamp, s; 0 where the file has none."""
    return float((stream.start_time or 0) * stream.time_base)


def seek(container, stream, time_s):
    """Seek a stream's (None: the preferred stream's) last key frame that is not later than time_s."""
    container.seek(int(time_s / (stream.time_base if stream else Fraction(1, av.time_base))), stream=stream)


class Packets(NamedTuple):
    """What reading the packets of a stream tells."""

    end_s: float  # until when the last one lasts
    stamps: list  # when each is shown, in the unit of the stream
    alike: dict  # CRC-32 of a key frame's bytes → the numbers of its packets


def read_through(container, stream):
    """The Packets of a stream: those near its end where stamps are true after a seek, else all from here on.

    Raises MediaError where time stamps run backwards, so that a time could mean two places.
    """
    if container.format.name.startswith(STAMPED) and container.duration:
        with contextlib.suppress(av.FFmpegError):
            seek(container, stream, ((container.start_time or 0) + container.duration) / av.time_base)
    of_frames = stream.type == "video" and stream.average_rate
    usual = 1 / stream.average_rate / stream.time_base if of_frames else 0
    listed = list(stream.index_entries) if container.format.name == "avi" and of_frames else ()
    listed = {entry.pos + 8: entry.timestamp for entry in listed}  # behind the packet's head of 8 bytes
    for _ in range(2):
        places, stamps, durations, alike = [], [], [], {}
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if packet.is_keyframe and stream.type == "video":
                alike.setdefault(zlib.crc32(packet), []).append(len(stamps))
            places.append(packet.dts if packet.dts is not None else places[-1] if places else 0)
            stamps.append(packet.pts if packet.pts is not None else places[-1])
            if listed and abs(listed.get(packet.pos, places[-1]) - places[-1]) * stream.time_base > LOST_S:
                raise MediaError("a part of it is lost, which shifts what comes after")
            durations.append(packet.duration or usual)
            if not abs(stamps[-1] * stream.time_base) < LONGEST_S:
                raise MediaError("its time stamps are impossible, as of ogv that was cut without encoding")
            if len(places) > 1 and (places[-2] - places[-1]) * stream.time_base > BACKWARDS_S:
                at_s = float(places[-2] * stream.time_base)
                raise MediaError(f"its time stamps run backwards at {at_s:.1f} s")
        if stamps:
            break
        seek(container, stream, start_of(stream))  # the file is cut off before its index ends
    else:
        raise MediaError("a stream without packets")
    if container.format.name == "avi":
        # it has only the places of packets; FFmpeg guesses in which order these are shown
        places.sort()
        stamps = [places[rank] for rank in np.argsort(np.argsort(stamps, kind="stable"))]
    end = max(stamp + duration for stamp, duration in zip(stamps, durations, strict=True))
    return Packets(float(end * stream.time_base), stamps, alike)


_known = {}  # (what, a file, its size, its age, a stream): what `once_a_file` found


def once_a_file(find, container, stream):
    """What find(container, stream) finds, remembered in this process as long as the file stays the same."""
    status = os.stat(container.name)
    key = find.__qualname__, container.name, status.st_size, status.st_mtime_ns, stream.index
    if key not in _known:
        if len(_known) > 500:
            _known.clear()
        _known[key] = find(container, stream)
    return _known[key]


@functools.lru_cache(maxsize=16)
def resampler(source_hz, rate_hz):
    """From one rate to another; of an odd one, 44101 Hz, off by 1e-6: its exact filter takes gigabytes."""
    ratio = Fraction(source_hz, rate_hz).limit_denominator(1000)
    return torchaudio.transforms.Resample(*ratio.as_integer_ratio()) if ratio != 1 else torch.nn.Identity()
