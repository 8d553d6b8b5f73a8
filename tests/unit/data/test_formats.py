"""vidssl/data/decoding: files are opened as what they should be, and never open further files."""

import io
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.inspect_file import inspect_file
from vidssl.core.errors import DecodeError
from vidssl.data.decoding import open_video
from vidssl.data.decoding.image import FORMATS, open_image
from vidssl.data.decoding.video_stream import CONTAINERS, check_container, open_container
from vidssl.data.extensions import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS

Image.init()  # fills Image.OPEN and Image.SAVE
HLS = "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{}\n#EXT-X-ENDLIST\n"
DASH = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
mediaPresentationDuration="PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1"
bandwidth="1"><BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"""
SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"
IMF = """<?xml version="1.0"?><CompositionPlaylist xmlns="http://www.smpte-ra.org/schemas/2067-3/2016">
<Id>urn:uuid:0</Id><ContentTitle>{}</ContentTitle></CompositionPlaylist>"""
SCRIPTS = {  # {} stands for the file that is to be opened
    "concat": "ffconcat version 1.0\nfile {}\n",
    "concat_protocol": "ffconcat version 1.0\nfile 'file:{}'\n",
    "concat_unmarked": "file '{}'\n",
    "hls": HLS,
    "hls_key": HLS.replace("#EXTINF", '#EXT-X-KEY:METHOD=AES-128,URI="{}"\n#EXTINF', 1),
    "hls_master": "#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n{}\n",
    "dash": DASH,
    "sdp": SDP,
    "imf": IMF,
    "smooth": '<SmoothStreamingMedia MajorVersion="2"><StreamIndex Url="{}"/></SmoothStreamingMedia>',
    "vobsub": "# VobSub index file, v7\nid: en, index: 0\ntimestamp: 00:00:00:000, filepos: 000000000\n",
    "asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
    "m3u": "{}\n",
    "pls": "[playlist]\nFile1={}\nNumberOfEntries=1\n",
    "smil": '<smil><body><video src="{}"/></body></smil>',
    "rtsptext": "rtsptext\n{}\n",
    "tedcaptions": '{"captions":[{"duration":1,"content":"{}","startOfParagraph":true,"startTime":0}]}',
    "lavfi": "movie={}",
    "ffmetadata": ";FFMETADATA1\ntitle={}\n",
    "avisynth": 'DirectShowSource("{}")\n',
    "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{}" width="9" height="9"/></svg>',
    "eps": "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({}) (r) file\n%%EOF\n",
    "mpsub": "FORMAT=TIME\n1 2\n{}\n",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_script_or_playlist_is_opened_under_any_extension(script, make_video, tmp_path):
    target = tmp_path / "secret.mp4"
    target.write_bytes(make_video(3))
    for address in (str(target), target.name):
        data = SCRIPTS[script].replace("{}", address).encode()
        for ext in (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS):
            for decoder in ("auto", "decord"):
                with pytest.raises(DecodeError) as e:
                    open_video(data, ext, None, decoder)
                assert e.value.reason in ("not_a_video", "not_an_image")
            with pytest.raises(DecodeError):
                list(inspect_file(data, ext, "auto"))
        # As pack opens it: a file with a name, in the folder of the other.
        (tmp_path / "script.mp4").write_bytes(data)
        with open(tmp_path / "script.mp4", "rb") as file, pytest.raises((av.FFmpegError, ValueError)):
            open_container(file)


def test_containers_are_no_playlists_and_no_devices():
    allowed = {name for name in av.formats_available if set(name.split(",")) & set(CONTAINERS)}
    readable = {name: av.ContainerFormat(name, "r") for name in allowed if is_readable(name)}
    assert len(readable) >= 10 and not any(f.flags & av.format.Flags.no_file.value for f in readable.values())
    dangerous = "concat hls dash sdp imf image2 lavfi rtsp vobsub webm_dash_manifest tedcaptions ffmetadata"
    assert not set(dangerous.split()) & {part for name in allowed for part in name.split(",")}


def is_readable(name: str) -> bool:
    try:
        return av.ContainerFormat(name, "r").is_input
    except ValueError:
        return False


@pytest.mark.parametrize("kind", sorted(set(Image.SAVE) - set(FORMATS) - {"MPO"}))
def test_other_image_formats_are_refused(kind):
    out = io.BytesIO()
    try:
        Image.new("L" if kind in ("SPIDER", "MSP") else "RGB", (16, 16)).save(out, kind)
    except (OSError, ValueError, KeyError):
        pytest.skip(f"this Pillow does not write {kind}")
    for ext in IMAGE_EXTENSIONS:
        with pytest.raises(DecodeError, match="not_an_image"):
            open_video(out.getvalue(), ext)


def test_only_the_expected_image_formats_are_known():
    assert set(FORMATS) <= set(Image.OPEN)
    eps = SCRIPTS["eps"].replace("{}", "/etc/hostname").encode()
    with pytest.raises(OSError, match="cannot identify"):
        open_image(io.BytesIO(eps))


CONTAINER_OF = {"mp4": "mp4", "mov": "mov", "m4v": "mp4", "mkv": "matroska", "avi": "avi"}
CONTAINER_OF |= {"3gp": "3gp", "ts": "mpegts", "mts": "mpegts", "m2ts": "mpegts"}
CONTAINER_OF |= {"asf": "asf", "wmv": "asf"}
CODEC_OF = {"flv": ("flv", "flv"), "webm": ("webm", "libvpx"), "ogv": ("ogg", "libvpx")}
CODEC_OF |= {"gif": ("gif", "gif"), "mpg": ("mpeg", "mpeg1video"), "vob": ("vob", "mpeg2video")}
CODEC_OF |= {"mpeg": ("mpeg2video", "mpeg2video")}
CODEC_OF |= {ext: (container, "mpeg4") for ext, container in CONTAINER_OF.items()}


@pytest.mark.parametrize("ext", VIDEO_EXTENSIONS)
def test_real_videos_of_every_extension_open(ext):
    container, codec = CODEC_OF[ext]
    out = io.BytesIO()
    try:
        with av.open(out, "w", format=container) as file:
            stream = file.add_stream(codec, rate=25)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            for i in range(6):
                picture = np.full((48, 64, 3), 40 * i, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    check_container(out.getvalue())
    with open_video(out.getvalue(), ext) as video:
        assert len(video) == 6 and video.size == (48, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_real_images_open_under_each_extension(kind, make_image):
    for ext in IMAGE_EXTENSIONS:
        with open_video(make_image(kind), ext) as image:
            assert image.size == (48, 64)


def test_an_archive_or_text_is_no_video(tmp_path: Path):
    tar = tmp_path / "x.tar"
    with tarfile.open(tar, "w") as file:
        file.addfile(tarfile.TarInfo("a"))
    for data in (tar.read_bytes(), b"PK\x03\x04" + bytes(64), b"GIF8 is no gif", b"text " * 400):
        with pytest.raises(DecodeError) as e:
            open_video(data, "mp4")
        assert "\n" not in str(e.value)
