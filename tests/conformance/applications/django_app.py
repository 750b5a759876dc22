"""Django through ASGI: pages of both kinds, in a coroutine and in a thread; it has no WebSockets."""

import django
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path

settings.configure(SECRET_KEY="of a test", ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__)
django.setup()


async def index(request):
    return HttpResponse("ok")


def threaded(request):
    return HttpResponse("ok")


urlpatterns = [path("", index), path("threaded", threaded)]

app = get_asgi_application()
