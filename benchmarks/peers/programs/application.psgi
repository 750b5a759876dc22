# What Starman serves.
use strict;
use warnings;
use Time::HiRes qw(sleep);

open my $file, '<', $ENV{RELEASE_FILE} or die;
my $release = <$file>;
die "a release that does not start\n" if $release eq 'broken';
sleep $ENV{IMPORT_SECONDS};

sub {
    my @parts = grep { length } split m{/}, $_[0]{PATH_INFO};
    sleep $parts[1] if $parts[0] eq 'slow';
    my $body = "$release $parts[-1]";
    return [200, ['Content-Type' => 'text/plain', 'Content-Length' => length $body], [$body]];
};
