"""The file name extensions that are read, without the decoders behind them."""

VIDEO_EXTENSIONS = (
    *("mp4", "avi", "webm", "mkv", "mov", "m4v", "mpg", "mpeg", "wmv"),
    *("flv", "3gp", "ts", "mts", "m2ts", "ogv", "asf", "vob", "gif"),
)
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "bmp", "webp")
MEDIA_EXTENSIONS = (*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS)
